"""What the server's machine does in a run over the network: `flexp serve`."""

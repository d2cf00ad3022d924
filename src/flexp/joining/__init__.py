"""What a device does in a run over the network: `flexp join`."""

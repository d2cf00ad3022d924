"""The client's side: the desk where it works, its session with the server, its private memory."""

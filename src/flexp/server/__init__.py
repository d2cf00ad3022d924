"""The server's side: tenants on the shared backbone, the trunk they wear, the table of steps."""

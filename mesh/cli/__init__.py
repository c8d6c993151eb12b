"""The command `densemesh`: serve, up, and what talks to a running mesh."""

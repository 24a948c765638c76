"""The `shoal` command's parts: each file one group of commands over the same terminal."""

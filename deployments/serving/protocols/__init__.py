"""One file a dialect; each turns bytes into the same request and its answer back into bytes."""

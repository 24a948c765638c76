"""The machines and the loop: what runs where, and the one controller that keeps it so."""

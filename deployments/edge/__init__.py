"""The edge: one HAProxy a node, configured by pure code from the routing state."""

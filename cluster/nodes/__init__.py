"""Where machines come from: a provider lists, adds and removes them; notices say which go."""

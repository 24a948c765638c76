"""Words that give a sentence its mood."""

GOOD = frozenset(["good", "great", "happy", "calm", "bright", "love", "sunny", "delighted"])
SAD = frozenset(["bad", "sad", "angry", "dark", "hate", "grey", "tired", "lost"])

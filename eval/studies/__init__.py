"""Studies of shaped rewards: gold reward against KL for every shaping and decoder. See docs/stackelberg.md."""

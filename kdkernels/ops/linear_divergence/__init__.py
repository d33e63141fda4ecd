"""Row divergences from hidden states and output heads, without the logits ever being whole."""

"""From attention and gradients to relevance: where it starts, and how it crosses from one tower to the other."""

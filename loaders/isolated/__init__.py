"""Models that run their author's code, each in a process of its own."""

"""The demo and the benches: one script per question, see README.md. Run from the repository root; not in the wheel."""

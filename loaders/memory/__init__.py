"""Memory that models take: measured, and given back."""

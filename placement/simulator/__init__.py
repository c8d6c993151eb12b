"""The real engine of every pod, run against a virtual clock: many pods, many models, faults, all from one seed."""

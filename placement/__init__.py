"""Where copies of models live: a pure decision core. Events in, actions out; no I/O, no clock, no unseeded draw."""

"""Many tenants' fine-tunes of one ONNX architecture on one session, their weights fed from mapped files.

`split` makes of an `.onnx` file its skeleton, which is the graph whose weights are inputs, and a weights file;
fine-tunes of one network have the same skeleton, byte for byte. `architectures` keeps one session per skeleton in use.
`model` is a model of it: activating one maps its weights, and nothing is parsed, optimised or copied. Such a session
cannot prepack weights, so `promotion` gives the busiest models one of their own that does.
"""

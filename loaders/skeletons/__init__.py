"""Networks without weights, each of which any number of models share: `safetensors` brings the weights.

`header` reads and checks what lies in a `.safetensors` file. A skeleton is a pure function of weights by name and
inputs: `network` makes one of a declaration, which is data, `exported` one of a `torch.export`ed program, which is
code. `family` keeps one per architecture for as long as models of it are loaded, and runs several of them in one call,
with weights that stand side by side in memory (`rows`).
"""

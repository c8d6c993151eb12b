"""What all pods agree on: models, vmodels, pods and their copies. One file per store behind one port."""

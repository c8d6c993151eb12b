"""A model server beside the pod that loads and runs models for it: whatever speaks ModelMesh's runtime SPI and V2."""

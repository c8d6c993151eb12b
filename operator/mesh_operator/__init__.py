"""The Kubernetes operator: KServe InferenceServices onto a mesh, over its management API."""

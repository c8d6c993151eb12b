# A pod of the mesh:                     docker build -t densemesh:0.1.0 .
# with PyTorch and ONNX Runtime on CUDA:  docker build -t densemesh-cuda:0.1.0 --build-arg \
#                                           EXTRAS=gpu,safetensors,sklearn,xgboost,lightgbm,pandas,mlflow,storage .
# PyTorch brings CUDA's libraries with it; the node has the driver. `gpu` and `onnx` (`convert`) exclude each other.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
ARG EXTRAS=onnx,convert,sklearn,xgboost,lightgbm,openvino,pandas,mlflow,storage
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY mesh mesh
COPY placement placement
COPY loaders loaders
COPY protos protos
RUN python -m venv /opt/densemesh \
    && /opt/densemesh/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

FROM python:${PYTHON}-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/densemesh /opt/densemesh
ENV PATH=/opt/densemesh/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8033 2112
ENTRYPOINT ["densemesh"]
CMD ["serve"]

// What an unmodified @connectrpc/connect-node sees of a pod over its gRPC transport, on Node's own HTTP/2:
// `node connect.mjs HOST:PORT DESCRIPTORS [CA CERT KEY]` prints JSON. DESCRIPTORS is what `protoc --descriptor_set_out` wrote.
import { readFileSync } from "node:fs";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

const [, , address, descriptors, ...tls] = process.argv;
const [ca, cert, key] = tls.map((path) => readFileSync(path));
const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, readFileSync(descriptors)));
const transport = createGrpcTransport({
  baseUrl: `${ca ? "https" : "http"}://${address}`,
  nodeOptions: { ca, cert, key },
});
const client = createClient(registry.getService("inference.GRPCInferenceService"), transport);

function request(modelName, bytes, id = "") {
  const inputs = [{ name: "INPUT0", datatype: "FP32", shape: [1n, BigInt(bytes.length / 4)] }];
  return { modelName, id, inputs, rawInputContents: [bytes] };
}

async function failed(work) {
  try {
    await work;
  } catch (error) {
    const { code, rawMessage } = ConnectError.from(error);
    return [Code[code], rawMessage];
  }
}

async function* requests() {
  for (const [id, model] of [["1", "identity_fp32"], ["2", "nobody"], ["3", "identity_fp32"]]) {
    yield request(model, new Uint8Array(12), id);
  }
}

async function streamed() {
  const seen = [];
  for await (const message of client.modelStreamInfer(requests())) {
    seen.push(message.errorMessage || `ok ${message.inferResponse.id}`);
  }
  return seen;
}

const large = new Uint8Array(20 << 20).fill(1);
const answer = await client.modelInfer(request("identity_fp32", large));
const row = new Uint8Array(12);
const [late] = await failed(client.modelInfer(request("slow", row), { timeoutMs: 100 }));
const [cancelled] = await failed(client.modelInfer(request("slow", row), { signal: AbortSignal.timeout(50) }));
const error = await failed(client.modelInfer(request("grün 100 %", row)));
const same = Buffer.compare(answer.rawOutputContents[0], large) === 0;
console.log(JSON.stringify({ large: same, streamed: await streamed(), late, cancelled, error }));
process.exit();

// What an unmodified @grpc/grpc-js sees of a pod: `node grpc_js.js SCENES HOST:PORT PROTO [CA [CERT KEY]]` prints JSON, one
// member for each scene.
"use strict";

const fs = require("node:fs");
const grpc = require("@grpc/grpc-js");
const { loadSync } = require("@grpc/proto-loader");

const [, , wanted, address, proto, ...tls] = process.argv;
const V2 = proto && grpc.loadPackageDefinition(loadSync(proto, { keepCase: true })).inference.GRPCInferenceService;
const [ca, cert, key] = tls.map((path) => fs.readFileSync(path));
const credentials = ca ? grpc.credentials.createSsl(ca, key, cert) : grpc.credentials.createInsecure();
const bytes = (message) => message;

/** A call's end: its status' name and message, and the response if there was one. */
function ended(start) {
  return new Promise((resolve) =>
    start((error, response) =>
      resolve(error ? { status: grpc.status[error.code], message: error.details } : { status: "OK", response }),
    ),
  );
}

function request(model, floats, id = "") {
  return {
    model_name: model,
    id,
    inputs: [{ name: "INPUT0", datatype: "FP32", shape: [1, floats.length] }],
    raw_input_contents: [Buffer.from(floats.buffer)],
  };
}

const row = Float32Array.of(1.5, -2, 3.25);

async function infer(client, model, floats = row, metadata = new grpc.Metadata(), options = {}) {
  return ended((done) => client.ModelInfer(request(model, floats), metadata, options, done));
}

function same(answer, floats = row) {
  return answer.status === "OK" && answer.response.raw_output_contents[0].equals(Buffer.from(floats.buffer));
}

const scenes = {
  async unary(client) {
    return same(await infer(client, "identity_fp32"));
  },

  async many(client) {
    const answers = await Promise.all(Array.from({ length: 200 }, () => infer(client, "identity_fp32")));
    return answers.filter((answer) => same(answer)).length;
  },

  /** 20 MB each way: many windows, and many frames of one message. */
  async large(client) {
    const floats = new Float32Array(5 << 20).fill(0.5);
    return same(await infer(client, "identity_fp32", floats), floats);
  },

  async stream(client) {
    const seen = [];
    const call = client.ModelStreamInfer();
    call.on("data", (message) => seen.push(message.error_message || `ok ${message.infer_response.id}`));
    for (const [id, model] of [["1", "identity_fp32"], ["2", "nobody"], ["3", "identity_fp32"]]) {
      call.write(request(model, row, id));
    }
    call.end();
    const status = await new Promise((resolve) => call.on("status", resolve));
    return [grpc.status[status.code], ...seen];
  },

  async deadline(client) {
    return (await infer(client, "slow", row, new grpc.Metadata(), { deadline: Date.now() + 100 })).status;
  },

  async cancel(client) {
    const cancelled = await ended((done) => {
      const call = client.ModelInfer(request("slow", row), done);
      setTimeout(() => call.cancel(), 50);
    });
    return [cancelled.status, same(await infer(client, "identity_fp32"))];
  },

  async error(client) {
    const { status, message } = await infer(client, "grün 100 %");
    return [status, message];
  },

  /** The model by header, in both forms; the response's headers name the pod. */
  async metadata(client) {
    const told = [];
    for (const [name, value] of [["mm-model-id", "identity_fp32"], ["mm-model-id-bin", Buffer.from("identity_fp32")]]) {
      const metadata = new grpc.Metadata();
      metadata.set(name, value);
      let headers;
      const answer = await ended((done) => {
        client.ModelInfer(request("", row), metadata, done).on("metadata", (received) => (headers = received));
      });
      told.push(same(answer), headers.get("densemesh-pod")[0]);
    }
    return told;
  },

  /** Pings while a call waits; one that is not answered within half a second would end it. */
  async keepalive() {
    const options = { "grpc.keepalive_time_ms": 100, "grpc.keepalive_timeout_ms": 500 };
    const client = new V2(address, credentials, options);
    const { status } = await infer(client, "slow");
    client.close();
    return status;
  },

  async gzip() {
    const client = new V2(address, credentials, { "grpc.default_compression_algorithm": 2 });
    const floats = new Float32Array(100_000).fill(0.5);
    const right = same(await infer(client, "identity_fp32", floats), floats);
    client.close();
    return right;
  },

  /** Calls without a pause until stdin ends, while the first server of the list `address` goes away. */
  async drain() {
    const client = new grpc.Client(`ipv4:${address}`, credentials);
    const told = { calls: 0, failed: [] };
    let going = true;
    const work = Array.from({ length: 20 }, async () => {
      while (going) {
        const answer = await ended((done) =>
          client.makeUnaryRequest("/test/later", bytes, bytes, Buffer.from("ab"), done),
        );
        told.calls += 1;
        if (answer.status !== "OK" || !answer.response.equals(Buffer.from("ba"))) told.failed.push(answer);
      }
    });
    console.error("calling");
    await new Promise((resolve) => process.stdin.once("end", resolve).resume());
    going = false;
    await Promise.all(work);
    client.close();
    return told;
  },

  async unavailable(client) {
    return (await infer(client, "identity_fp32")).status;
  },
};

async function main() {
  const unlimited = { "grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1 };
  const client = V2 && new V2(address, credentials, unlimited);
  const told = {};
  for (const scene of wanted.split(",")) told[scene] = await scenes[scene](client);
  if (client) client.close();
  console.log(JSON.stringify(told));
}

main();

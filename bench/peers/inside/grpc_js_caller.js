// grpc-js as a load generator, as bench/callers.py: node grpc_js_caller.js PLAN
const fs = require("node:fs");
const { setTimeout: sleep } = require("node:timers/promises");
const grpc = require("@grpc/grpc-js");

const plan = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const messages = plan.messages.map(([id, message]) => [id, Buffer.from(message, "base64")]);
const same = (bytes) => bytes;
let number = 0, answered = 0, failed = 0, running = true;

function next(client) {
  if (!running) return;
  number += 1;
  const [id, message] = messages[(number * 7919) % messages.length];
  const metadata = new grpc.Metadata();
  metadata.set("mm-model-id", id);
  const trace = (BigInt(number) * 0x9e3779b97f4a7c15n) % (1n << 128n);
  metadata.set("traceparent", `00-${trace.toString(16).padStart(32, "0")}-${number.toString(16).padStart(16, "0")}-01`);
  const deadline = Date.now() + 10_000 + (number % 20_000);
  client.makeUnaryRequest(plan.method, same, same, message, metadata, { deadline }, (error) => {
    if (error) failed += 1;
    else answered += 1;
    next(client);
  });
}

async function main() {
  const options = { "grpc.use_local_subchannel_pool": 1 };
  for (let n = 0; n < plan.connections; n += 1) {
    const client = new grpc.Client(plan.address, grpc.credentials.createInsecure(), options);
    for (let stream = 0; stream < plan.streams; stream += 1) next(client);
  }
  await sleep(500);
  const before = [answered, failed];
  console.log(JSON.stringify({ begun: true }));
  await sleep(plan.seconds * 1000);
  console.log(JSON.stringify({ answered: answered - before[0], failed: failed - before[1] }));
  process.exit(0);
}

main();

// node node_runner.js PACKAGE MODEL FOLDER REPEATS: runs an ONNX model in onnxruntime-node or onnxruntime-web (wasm).
//
// FOLDER/feeds.json lists name, type, dims and file of each input; what comes out goes to FOLDER/results.json and
// FOLDER/N.out, float32. Times are of one run each, in milliseconds.
const fs = require("fs");
const path = require("path");
const [name, model, folder, repeats] = process.argv.slice(2);
const ort = require(require.resolve(name, { paths: [process.cwd(), ...(process.env.NODE_PATH || "").split(path.delimiter)] }));

async function main() {
  if (name === "onnxruntime-web") ort.env.wasm.numThreads = 1;
  const options = name === "onnxruntime-web" ? { executionProviders: ["wasm"] } : { intraOpNumThreads: 1 };
  const session = await ort.InferenceSession.create(name === "onnxruntime-web" ? fs.readFileSync(model) : model, options);
  const feeds = {};
  for (const { name: input, type, dims, file } of JSON.parse(fs.readFileSync(path.join(folder, "feeds.json")))) {
    const raw = fs.readFileSync(path.join(folder, file));
    const bytes = raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length);
    const data = type === "int64" ? new BigInt64Array(bytes) : type === "int32" ? new Int32Array(bytes) : new Float32Array(bytes);
    feeds[input] = new ort.Tensor(type, data, dims);
  }
  const times = [];
  let found;
  for (let i = 0; i <= Number(repeats); i++) {
    const began = performance.now();
    found = await session.run(feeds);
    if (i) times.push(performance.now() - began);
  }
  const outputs = session.outputNames.map((output, i) => {
    const { data, dims, type } = found[output];
    fs.writeFileSync(path.join(folder, `${i}.out`), Buffer.from(data.buffer, data.byteOffset, data.byteLength));
    return { name: output, dims, type, file: `${i}.out` };
  });
  fs.writeFileSync(path.join(folder, "results.json"), JSON.stringify({ outputs, times }));
}

main().catch((error) => {
  console.error(String(error));
  process.exit(1);
});

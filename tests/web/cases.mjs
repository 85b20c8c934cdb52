// Runs cases with transformers.js and prints the results as JSON: node cases.mjs DIRECTORY_OF_NODE_MODULES CASES.json
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, file] = process.argv.slice(2);
const library = createRequire(`${modules}/`).resolve("@huggingface/transformers");
const { AutoModel, AutoModelForCausalLM, AutoTokenizer, Tensor, env, LogLevel } = await import(pathToFileURL(library));
Object.assign(env, { allowRemoteModels: false, localModelPath: "/", logLevel: LogLevel?.ERROR });

const numbers = (tensor) => Array.from(tensor.data, Number);

async function ids({ model, texts }) {
  const tokenizer = await AutoTokenizer.from_pretrained(model);
  return texts.map((text) => tokenizer.encode(text));
}

async function generate({ model, prompts, chats, dtype, ...options }) {
  const tokenizer = await AutoTokenizer.from_pretrained(model);
  const network = await AutoModelForCausalLM.from_pretrained(model, { dtype });
  const results = [];
  for (const prompt of prompts ?? chats) {
    const inputs = prompts ? tokenizer(prompt) : tokenizer.apply_chat_template(prompt, { add_generation_prompt: true, return_dict: true });
    results.push(numbers(await network.generate({ ...inputs, do_sample: false, ...options })));
  }
  return results;
}

async function classify({ model, texts, dtype }) {
  const tokenizer = await AutoTokenizer.from_pretrained(model);
  const { sessions } = await AutoModel.from_pretrained(model, { dtype });
  const results = [];
  for (const text of texts) {
    const all = tokenizer.encode(text);
    const limit = tokenizer.config.model_max_length;
    const ids = all.length > limit ? [...all.slice(0, limit - 1), all.at(-1)] : all; // `truncation` would drop the last special token
    const input_ids = new Tensor("int64", ids.map(BigInt), [1, ids.length]).ort_tensor;
    const attention_mask = new Tensor("int64", ids.map(() => 1n), [1, ids.length]).ort_tensor;
    const { logits } = await sessions.model.run({ input_ids, attention_mask });
    results.push(numbers(logits));
  }
  return results;
}

const tasks = { ids, generate, classify };
const answers = [];
for (const { task, ...options } of JSON.parse(readFileSync(file, "utf8"))) {
  answers.push(await tasks[task](options).catch((error) => ({ error: String(error) })));
}
console.log(JSON.stringify(answers));

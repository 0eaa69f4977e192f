// The steps by openai-node. What it is called with and prints: see steps.py.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const given = JSON.parse(process.argv[2]);
const list = JSON.parse(readFileSync(new URL("steps.json", import.meta.url)));
const { texts, tool } = list;
const model = given.model;
const baseURL = `${given.url}/v1`;
const client = new OpenAI({ baseURL, apiKey: given.key });

const question = [{ role: "user", content: texts.question }];
const short = { model, messages: question, max_tokens: 6, temperature: 0 };
const tools = [{ type: "function", function: tool }];
const calling = {
  ...short,
  max_tokens: 60,
  tools,
  tool_choice: { type: "function", function: { name: tool.name } },
};
const asked = { model, input: texts.question, max_output_tokens: 16, temperature: 0 };
const responsesTools = [{ type: "function", strict: true, ...tool }];
const endless = {
  ...short,
  messages: [{ role: "user", content: texts.endless.repeat(400) }],
  max_tokens: 2000,
};
const Place = z.object({ name: z.enum(["Oslo", "Rome"]), warm: z.boolean() });
const parsing = { ...short, max_tokens: 100, response_format: zodResponseFormat(Place, "place") };

async function collected(stream) {
  const found = [];
  for await (const one of stream) found.push(one);
  return found;
}

async function raised(kind, promise) {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof kind, `not ${kind.name} but ${error}`);
    return error;
  }
  throw new assert.AssertionError({ message: `no ${kind.name}` });
}

async function loadComesTo(inFlight) {
  for (let i = 0; i < 100; i++) {
    const { backends } = await (await fetch(`${given.admin}/backends`)).json();
    if (backends.find((one) => one.name === model).in_flight === inFlight) return;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new assert.AssertionError({ message: `${model} has not come to ${inFlight} requests` });
}

function checkCall(call) {
  assert.equal(call.function.name, tool.name);
  assert.ok(call.id);
  assert.ok(["Oslo", "Rome"].includes(JSON.parse(call.function.arguments).place));
  return call.function.arguments;
}

const steps = {
  async chat() {
    const answer = await client.chat.completions.create(short);
    assert.equal(answer.model, model);
    const [choice] = answer.choices;
    assert.equal(choice.message.role, "assistant");
    assert.equal(typeof choice.message.content, "string");
    assert.ok(["stop", "length"].includes(choice.finish_reason));
    const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
    assert.equal(total_tokens, prompt_tokens + completion_tokens);
    return choice.message.content;
  },
  async chat_stream() {
    const chunks = await collected(await client.chat.completions.create({ ...short, stream: true }));
    const choices = chunks.flatMap((chunk) => chunk.choices);
    assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
    assert.deepEqual(choices.map((one) => one.delta.role).filter(Boolean), ["assistant"]);
    assert.equal(choices.filter((one) => one.finish_reason).length, 1);
    assert.ok(!chunks.some((chunk) => chunk.usage));
    return chunks.length;
  },
  async completions() {
    const answer = await client.completions.create({
      model,
      prompt: texts.prompt,
      max_tokens: 5,
      temperature: 0,
    });
    assert.equal(answer.usage.completion_tokens, 5);
    return answer.choices[0].text;
  },
  async completions_stream() {
    const request = { model, prompt: texts.prompt, max_tokens: 5, temperature: 0, stream: true };
    const chunks = await collected(await client.completions.create(request));
    const text = chunks.flatMap((chunk) => chunk.choices).map((one) => one.text).join("");
    assert.equal(text, await steps.completions());
    return chunks.length;
  },
  async system() {
    const messages = [{ role: "system", content: texts.system }, ...question];
    const answer = await client.chat.completions.create({ ...short, messages });
    const plain = await client.chat.completions.create(short);
    assert.ok(answer.usage.prompt_tokens > plain.usage.prompt_tokens);
    return answer.usage.prompt_tokens;
  },
  async parts() {
    const content = [texts.prompt, texts.question].map((text) => ({ type: "text", text }));
    const answer = await client.chat.completions.create({
      ...short,
      messages: [{ role: "user", content }],
    });
    assert.ok(answer.usage.prompt_tokens > 12);
    return answer.usage.prompt_tokens;
  },
  async turns() {
    const { message } = (await client.chat.completions.create(short)).choices[0];
    const messages = [...question, message, ...question];
    const answer = await client.chat.completions.create({ ...short, messages });
    return answer.choices[0].message.content;
  },
  async stop() {
    const answer = await client.completions.create({
      model,
      prompt: texts.until_stop,
      max_tokens: 48,
      temperature: 0,
      stop: texts.stop,
    });
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.ok(!answer.choices[0].text.includes(texts.stop));
    return answer.choices[0].text;
  },
  async max_tokens() {
    const answer = await client.chat.completions.create({ ...short, max_tokens: 2 });
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 2);
    return "kept";
  },
  async n() {
    const answer = await client.chat.completions.create({ ...short, temperature: 1, n: 2 });
    assert.deepEqual(answer.choices.map((one) => one.index), [0, 1]);
    return answer.choices.map((one) => one.message.content);
  },
  async n_stream() {
    const request = { ...short, temperature: 1, n: 2, stream: true };
    const chunks = await collected(await client.chat.completions.create(request));
    const ended = chunks.flatMap((chunk) => chunk.choices).filter((one) => one.finish_reason);
    assert.deepEqual(ended.map((one) => one.index).sort(), [0, 1]);
    return ended.length;
  },
  async stream_usage() {
    const request = { ...short, stream: true, stream_options: { include_usage: true } };
    const chunks = await collected(await client.chat.completions.create(request));
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.ok(chunks.at(-1).usage.total_tokens > 5);
    return chunks.at(-1).usage.total_tokens;
  },
  async logprobs() {
    const answer = await client.chat.completions.create({ ...short, logprobs: true });
    const { content } = answer.choices[0].logprobs;
    assert.ok(content.length > 0 && content.every((one) => one.logprob <= 0));
    return content.length;
  },
  async seed() {
    const request = { ...short, temperature: 1, seed: 7 };
    const first = await client.chat.completions.create(request);
    const second = await client.chat.completions.create(request);
    assert.equal(first.choices[0].message.content, second.choices[0].message.content);
    return first.choices[0].message.content;
  },
  async tool() {
    const answer = await client.chat.completions.create(calling);
    assert.equal(answer.choices[0].message.tool_calls.length, 1);
    return checkCall(answer.choices[0].message.tool_calls[0]);
  },
  async tool_stream() {
    const message = await client.chat.completions.stream(calling).finalMessage();
    return checkCall(message.tool_calls[0]);
  },
  async tool_result() {
    const { message } = (await client.chat.completions.create(calling)).choices[0];
    const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "Rain." };
    const messages = [...question, message, result];
    const answer = await client.chat.completions.create({ ...short, messages, tools });
    return answer.choices[0].message.content;
  },
  async structured() {
    const answer = await client.chat.completions.parse(parsing);
    Place.parse(answer.choices[0].message.parsed);
    return answer.choices[0].message.parsed;
  },
  async structured_stream() {
    const answer = await client.chat.completions.stream(parsing).finalChatCompletion();
    Place.parse(answer.choices[0].message.parsed);
    return answer.choices[0].message.parsed;
  },
  async image() {
    const url = `data:image/png;base64,${btoa("not looked at")}`;
    const content = [{ type: "image_url", image_url: { url } }];
    return client.chat.completions.create({ ...short, messages: [{ role: "user", content }] });
  },
  async unknown_model() {
    const call = client.chat.completions.create({ ...short, model: "nonesuch" });
    const error = await raised(OpenAI.NotFoundError, call);
    assert.equal(error.code, "model_not_found");
    assert.equal(error.param, "model");
    return error.message;
  },
  async bad_key() {
    const stranger = new OpenAI({ baseURL, apiKey: "wrong" });
    const call = stranger.chat.completions.create(short);
    const error = await raised(OpenAI.AuthenticationError, call);
    assert.equal(error.code, "invalid_api_key");
    return error.message;
  },
  async bad_field() {
    const call = client.chat.completions.create({ ...short, temperature: "hot" });
    const error = await raised(OpenAI.BadRequestError, call);
    assert.equal(error.param, "temperature");
    return error.message;
  },
  async models() {
    const listed = (await collected(await client.models.list())).map((one) => one.id);
    assert.ok(listed.includes(model) && listed.includes(given.embedder));
    assert.equal((await client.models.retrieve(model)).id, model);
    return listed;
  },
  async embeddings() {
    const answer = await client.embeddings.create({ model: given.embedder, input: ["sea", "land"] });
    assert.deepEqual(answer.data.map((one) => one.embedding.length), [64, 64]);
    return answer.data.map((one) => one.index);
  },
  async responses() {
    const answer = await client.responses.create({ ...asked, instructions: texts.system });
    assert.ok(["completed", "incomplete"].includes(answer.status));
    assert.deepEqual(answer.output.map((item) => item.type), ["message"]);
    assert.equal(typeof answer.output_text, "string");
    return answer.output_text;
  },
  async responses_stream() {
    const events = await collected(await client.responses.create({ ...asked, stream: true }));
    assert.deepEqual(events.map((one) => one.sequence_number), [...events.keys()]);
    assert.equal(events[0].type, "response.created");
    assert.ok(["response.completed", "response.incomplete"].includes(events.at(-1).type));
    await client.responses.stream(asked).finalResponse();
    return events.length;
  },
  async responses_continued() {
    const first = await client.responses.create(asked);
    const second = await client.responses.create({ ...asked, previous_response_id: first.id });
    assert.ok(second.usage.input_tokens > first.usage.input_tokens);
    assert.equal((await client.responses.retrieve(first.id)).output_text, first.output_text);
    await client.responses.delete(first.id);
    await raised(OpenAI.NotFoundError, client.responses.retrieve(first.id));
    return second.usage.input_tokens;
  },
  async responses_tool() {
    const answer = await client.responses.create({
      ...asked,
      max_output_tokens: 60,
      tools: responsesTools,
      tool_choice: { type: "function", name: tool.name },
    });
    const [call] = answer.output;
    assert.equal(call.type, "function_call");
    assert.ok(["Oslo", "Rome"].includes(JSON.parse(call.arguments).place));
    return call.arguments;
  },
  async responses_structured() {
    const request = { ...asked, max_output_tokens: 100 };
    const text = { format: zodTextFormat(Place, "place") };
    const answer = await client.responses.parse({ ...request, text });
    Place.parse(answer.output_parsed);
    return answer.output_parsed;
  },
  async leave() {
    const stream = await client.chat.completions.create({ ...endless, stream: true });
    for await (const _ of stream) {
      await loadComesTo(1);
      break;
    }
    await loadComesTo(0);
    return "freed";
  },
  async timeout() {
    const call = client.chat.completions.create(endless, { timeout: 1000, maxRetries: 0 });
    await raised(OpenAI.APIConnectionTimeoutError, call);
    await loadComesTo(0);
    return "freed";
  },
  async defaults() {
    let tries = 0;
    const counting = (...request) => {
      tries += 1;
      return fetch(...request);
    };
    const plain = new OpenAI({ baseURL, apiKey: given.key, fetch: counting });
    await plain.chat.completions.create(short);
    await raised(
      OpenAI.NotFoundError,
      plain.chat.completions.create({ ...short, model: "nonesuch" }),
    );
    assert.equal(tries, 2);
    return "one try each";
  },
};

async function take(step, lacking) {
  try {
    const detail = await step();
    return lacking ? [false, `answered without ${lacking}`] : [true, detail];
  } catch (error) {
    if (lacking && error instanceof OpenAI.BadRequestError) return [true, `refused: ${error.message}`];
    return [false, error.stack ?? error];
  }
}

const names = list.clients["openai-node"];
assert.deepEqual([...names].sort(), Object.keys(steps).sort(), "the list and the script differ");
for (const name of names) {
  if (given.only && !given.only.includes(name)) continue;
  const need = list.needs[name];
  const began = performance.now();
  const [ok, detail] = await take(steps[name], need && !given.can.includes(need) ? need : null);
  const seconds = Math.round((performance.now() - began) / 10) / 100;
  const told = typeof detail === "string" ? detail : JSON.stringify(detail);
  console.log(JSON.stringify({ name, ok, seconds, detail: told }));
}

// The chat page: a conversation that lives in this tab, and a stream of events for each answer. Whatever comes from
// outside becomes text by textContent; nothing here parses markup, loads an address or makes a link.
"use strict";

const $ = (id) => document.getElementById(id);
const NAMES = { user: "You", assistant: "The course model" };
const MOST = { messages: 200, characters: 20000, bytes: 900000 }; // of a request, within chat_server's limits

// Of this tab alone: sessionStorage is neither shared between tabs nor kept when one closes.
const state = { messages: [], memory: {} };
let running = null; // the AbortController of the answer that is coming

function load() {
  try {
    const kept = JSON.parse(sessionStorage.getItem("chat"));
    if (Array.isArray(kept.messages)) state.messages = kept.messages;
    if (kept.memory && typeof kept.memory === "object") state.memory = kept.memory;
  } catch {
    // nothing kept, or not by this page
  }
}

// Keeps as much of the end as there is room for; the memory goes with it, so that what was erased never comes back.
function save() {
  let messages = state.messages;
  while (true) {
    try {
      sessionStorage.setItem("chat", JSON.stringify({ ...state, messages }));
      break;
    } catch {
      if (!messages.length) break;
      messages = messages.slice(Math.ceil(messages.length / 2));
    }
  }
  if (messages.length < state.messages.length) {
    $("status").textContent = "Only the end of this long conversation survives a reload.";
  }
}

// Building the page

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = visible(text);
  return made;
}

// Control characters and those that turn the direction of what follows are shown as such; ends of lines are not.
function visible(text) {
  return String(text).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
}

function bubble(role) {
  const article = element("article", role);
  article.append(element("h2", "unseen", NAMES[role]));
  $("log").append(article);
  return article;
}

function paragraph(article, text) {
  const made = element("p", "text", text);
  made.dir = "auto";
  article.append(made);
  return made;
}

function aside(article, summary, tag, text) {
  const made = element("details", "aside");
  made.append(element("summary", "", summary), element(tag, "", text));
  article.append(made);
}

function showEvents(article, events) {
  let text = null;
  for (const event of events) text = showEvent(article, event, text);
}

// Shows one event; returns the paragraph that further text belongs to.
function showEvent(article, event, text) {
  const data = event.data || {};
  switch (event.kind) {
    case "token":
      if (!text) return paragraph(article, event.text);
      text.append(visible(event.text));
      return text;
    case "refusal":
      article.classList.add("refused");
      paragraph(article, event.text);
      return null;
    case "call":
      aside(article, `Calls ${data.name}`, "code", event.text);
      return null;
    case "result":
      aside(article, data.error ? `${data.name} fails` : `${data.name} answers`, "code", event.text);
      return null;
    case "citation":
      aside(article, `[${data.number}] ${event.text}`, "blockquote", data.passage);
      return text;
    case "notice":
      article.append(element("p", "aside", event.text));
      return text;
  }
  return text;
}

// What went wrong with the last question, with two ways on: the same again, or another wording.
function showProblem(text) {
  const problem = element("div", "problem");
  problem.setAttribute("role", "alert");
  const way = (name, go) => {
    const button = element("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => {
      problem.remove();
      go();
      $("question").focus();
    });
    return button;
  };
  problem.append(element("span", "", text), way("Try again", answer), way("Edit", edit));
  $("log").append(problem);
  scroll();
}

// Takes the last question back into the box, before what has been typed there since.
function edit() {
  const { content } = state.messages.pop();
  $("log").lastElementChild.remove();
  $("question").value = [content, $("question").value].filter(Boolean).join("\n");
  save();
  grow();
  refresh();
}

function showMemory() {
  const names = Object.keys(state.memory);
  $("memory-count").textContent = `(${names.length})`;
  $("memory-none").hidden = names.length > 0;
  $("memory-clear").hidden = names.length === 0;
  $("memory-facts").replaceChildren(
    ...names.map((name) => {
      const item = element("li", "");
      const forget = element("button", "", "Forget");
      forget.type = "button";
      forget.setAttribute("aria-label", `Forget ${name}`);
      forget.addEventListener("click", () => {
        delete state.memory[name];
        save();
        showMemory();
        $("memory").querySelector("summary").focus();
      });
      const text = element("span", "", `${name}: ${state.memory[name]}`);
      text.dir = "auto";
      item.append(text, forget);
      return item;
    }),
  );
}

function scroll() {
  const main = document.querySelector("main");
  main.scrollTop = main.scrollHeight;
}

// Follows the end while it comes, unless the reader has scrolled away from it.
function atEnd() {
  const main = document.querySelector("main");
  return main.scrollHeight - main.scrollTop - main.clientHeight < 80;
}

function refresh() {
  const busy = running !== null;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("new").disabled = busy;
  $("welcome").hidden = state.messages.length > 0;
}

function showAll() {
  $("log").replaceChildren();
  for (const message of state.messages) {
    const article = bubble(message.role);
    if (message.events) showEvents(article, message.events);
    else paragraph(article, message.content);
  }
  showMemory();
  refresh();
  scroll();
}

// Asking

function ask(text) {
  if (running || !text.trim()) return;
  document.querySelectorAll(".problem").forEach((problem) => problem.remove());
  // A question that got no answer gives way to the next one.
  if (state.messages.length && state.messages[state.messages.length - 1].role === "user") {
    state.messages.pop();
    $("log").lastElementChild?.remove();
  }
  state.messages.push({ role: "user", content: text });
  save();
  paragraph(bubble("user"), text);
  scroll();
  answer();
}

async function answer() {
  running = new AbortController();
  const article = bubble("assistant");
  article.setAttribute("aria-busy", "true");
  let text = paragraph(article, "");
  const events = [];
  $("status").textContent = "Answering…";
  refresh();
  scroll();
  let problem = "";
  let ended = false;
  try {
    for await (const event of eventsOf(running.signal)) {
      if (event.kind === "error") throw new Error(event.text);
      if (event.kind === "end") {
        ended = true;
        if (event.data.memory) state.memory = event.data.memory;
        continue;
      }
      const follow = atEnd();
      events.push(event);
      if (text && !text.textContent && event.kind !== "token") {
        text.remove();
        text = null;
      }
      text = showEvent(article, event, text);
      if (follow) scroll();
    }
    if (!ended) throw new Error("the connection broke off");
    const leftOut = state.messages.length - newest().length;
    $("status").textContent = leftOut ? `Answered, without the oldest ${leftOut} messages.` : "Answered.";
  } catch (error) {
    if (error.name === "AbortError") $("status").textContent = "Stopped.";
    else problem = `No answer: ${error.message}.`.replace(/\.\.$/, ".");
  }
  article.removeAttribute("aria-busy");
  const said = events.filter(({ kind }) => kind === "token" || kind === "refusal");
  const content = said.map(({ text }) => text).join("");
  if (problem) {
    article.remove(); // a part of an answer is asked for again
    $("status").textContent = "";
    showProblem(problem);
  } else if (content) {
    state.messages.push({ role: "assistant", content, events });
  } else {
    article.remove();
    $("status").textContent = "";
    showProblem(ended ? "The answer is empty." : "Stopped before the answer began.");
  }
  running = null;
  save();
  showMemory();
  refresh();
}

// The newest messages that one request may hold, from a question on, as the server takes them.
function newest() {
  const kept = [];
  let bytes = 0;
  for (let i = state.messages.length - 1; i >= 0 && kept.length < MOST.messages; i--) {
    const { role, content } = state.messages[i];
    const message = { role, content: content.slice(0, MOST.characters).replace(/\p{Surrogate}/gu, "\ufffd") };
    bytes += new TextEncoder().encode(JSON.stringify(message)).length + 1;
    if (bytes > MOST.bytes) break;
    kept.unshift(message);
  }
  while (kept.length > 1 && kept[0].role !== "user") kept.shift();
  return kept;
}

// The server's events for the conversation as it stands.
async function* eventsOf(signal) {
  let response;
  try {
    response = await fetch("chat/reply", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages: newest(), memory: state.memory }),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached");
  }
  if (!response.ok) throw new Error(await reasonOf(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      waiting += value;
      const lines = waiting.split("\n\n");
      waiting = lines.pop();
      for (const line of lines) {
        if (line === "data: [DONE]") return;
        if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the connection broke off");
  } finally {
    reader.cancel().catch(() => {}); // what still comes is not read
  }
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

// Events of the page

function send() {
  const text = $("question").value.trim();
  $("question").focus();
  if (running || !text) return;
  if (text.length > MOST.characters) {
    const [most, found] = [MOST.characters, text.length].map((count) => count.toLocaleString("en"));
    $("status").textContent = `A message has at most ${most} characters, this one has ${found}.`;
    return;
  }
  $("question").value = "";
  grow();
  ask(text);
}

function grow() {
  const question = $("question");
  question.rows = Math.min(8, question.value.split("\n").length);
}

function stop() {
  if (running) running.abort();
  $("question").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("question").addEventListener("input", grow);
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) stop();
  else if ($("memory").open) {
    $("memory").open = false;
    $("memory").querySelector("summary").focus();
  }
});
$("new").addEventListener("click", () => {
  if (running) return;
  state.messages = [];
  save();
  showAll();
  $("status").textContent = "A new conversation.";
  $("question").focus();
});
$("memory-clear").addEventListener("click", () => {
  state.memory = {};
  save();
  showMemory();
  $("memory").querySelector("summary").focus();
});
document.querySelectorAll(".example").forEach((button) => {
  button.addEventListener("click", () => {
    ask(button.textContent);
    $("question").focus();
  });
});

try {
  load();
  showAll();
} catch {
  Object.assign(state, { messages: [], memory: {} }); // what was kept is not of this page
  showAll();
}
if (state.messages.length && state.messages[state.messages.length - 1].role === "user") {
  showProblem("This question has no answer yet.");
}

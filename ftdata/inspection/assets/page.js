"use strict";
// All text is inserted as text nodes, so the text of a row is never parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const MAX_TOKENS = 100000, PER_PAGE = 25, PER_FRAME = 1500, PER_BLOCK = 200;
const state = { page: 0, rows: [], hit: null, cursor: null, drawing: 0 };

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Invisible characters and characters that change the text direction are shown as code points.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb]|\ud800(?![\udc00-\udfff])|\udb40[\udc00-\udfff]/g;

function addText(parent, text) {
  let start = 0;
  for (const match of text.matchAll(/[\n\t]/g)) {
    addPlain(parent, text.slice(start, match.index));
    const mark = make("span", "w", match[0] === "\n" ? "↵" : "⇥");
    mark.setAttribute("aria-hidden", "true");
    parent.append(mark, match[0]);
    start = match.index + 1;
  }
  addPlain(parent, text.slice(start));
}

function addPlain(parent, text) {
  let start = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > start) parent.append(text.slice(start, match.index));
    parent.append(make("span", "inv", "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
    start = match.index + match[0].length;
  }
  if (start < text.length) parent.append(text.slice(start));
}

// Returns lowercase text of the same length, so that offsets are valid in both texts.
function toLower(text) {
  const lower = text.toLowerCase().replaceAll("ς", "σ");
  if (lower.length === text.length) return lower;
  return Array.from(text, (char) => (char.toLowerCase().length === char.length ? char.toLowerCase() : char)).join("").replaceAll("ς", "σ");
}

// Decodes run lengths [value, length, value, length, ...] to one value per token.
function decodeRuns(runs, size) {
  const values = new Int32Array(size);
  for (let run = 0, index = 0; run < runs.length; run += 2) {
    values.fill(runs[run], index, index + runs[run + 1]);
    index += runs[run + 1];
  }
  return values;
}

for (const [number, row] of data.rows.entries()) {
  row.number = number;
  for (const example of row.examples) {
    const size = example.sizes.length;
    example.ends = new Int32Array(size);
    let end = 0;
    for (let token = 0; token < size; token++) example.ends[token] = end += example.sizes[token];
    example.isTrained = decodeRuns(example.trained, size);
    example.isControl = decodeRuns(example.control, size);
    example.isStop = decodeRuns(example.stop, size);
    example.ownerOf = decodeRuns(example.owner, size);
    example.isChanged = example.changed ? decodeRuns(example.changed, size) : null;
    example.trainedCount = example.isTrained.reduce((sum, trained) => sum + trained, 0);
    example.lower = toLower(example.text);
    example.row = row;
  }
  row.tokens = Math.max(0, ...row.examples.map((example) => example.sizes.length));
  const total = row.examples.reduce((sum, example) => sum + example.sizes.length, 0);
  row.share = total ? row.examples.reduce((sum, example) => sum + example.trainedCount, 0) / total : 2;
  row.notes = { text: [row.rejected, ...row.lost.map((lost) => lost.text), ...row.drift].join("\n") };
  row.notes.lower = toLower(row.notes.text);
}

// --- one example ---------------------------------------------------------------------------------------------------

function* drawTokens(example, box) {
  const { ends, isTrained, isControl, isStop, ownerOf, isChanged } = example;
  example.spans = [];
  const count = example.showAll ? ends.length : Math.min(ends.length, MAX_TOKENS);
  // Browsers are slow at laying out a paragraph of many elements, so lines are grouped in blocks that are drawn when visible.
  let block = null, blockStart = 0, isLineEnd = false, mark = null, group = null, groupOwner = -1;
  for (let token = 0; token < count; token++) {
    if (!block || (token - blockStart >= PER_BLOCK && (isLineEnd || token - blockStart >= 10 * PER_BLOCK))) {
      block = make("div", "lines");
      box.append(block);
      blockStart = token;
      mark = null;
      groupOwner = -1;
    }
    if (isTrained[token] !== (mark !== null ? 1 : 0)) {
      mark = isTrained[token] ? make("mark", "tr") : null;
      if (mark) block.append(mark);
      groupOwner = -1;
    }
    if (ownerOf[token] !== groupOwner) {
      const [, role, part] = data.owners[ownerOf[token]];
      group = make("span", role && part !== "scaffold" ? "o" : part === "scaffold" ? "sc" : "");
      if (role) group.dataset.role = role;
      if (role && part !== "scaffold") group.dir = "auto";
      (mark || block).append(group);
      groupOwner = ownerOf[token];
    }
    const span = make("span", "t");
    if (isControl[token]) span.classList.add("c");
    if (isStop[token]) span.classList.add("s");
    if (isChanged && isChanged[token]) span.classList.add("new");
    span.token = token;
    const text = example.text.slice(token ? ends[token - 1] : 0, ends[token]);
    isLineEnd = text.endsWith("\n");
    addText(span, text);
    if (example.images && example.images[token]) {
      const image = make("img", "im");
      image.src = example.images[token];
      image.alt = "";
      span.prepend(image);
    }
    group.append(span);
    example.spans.push(span);
    if (token % PER_FRAME === PER_FRAME - 1) yield;
  }
  if (count < ends.length) {
    const button = make("button", "", `show all ${ends.length.toLocaleString("en")} tokens`);
    button.type = "button";
    button.addEventListener("click", () => { example.showAll = true; show(state.page); });
    box.append(button);
  } else if (example.rest) {
    const remainder = make("span", "cut", "✂");
    addText(remainder, example.rest);
    (block || box).append(remainder);
  }
}

function markHits(example) {
  for (const span of example.spans) span.classList.remove("hit");
  if (!state.hit) return;
  for (const [start, end] of state.hit(example)) {
    let token = tokenAt(example.ends, start);
    for (; token < example.spans.length && (token ? example.ends[token - 1] : 0) < end; token++) example.spans[token].classList.add("hit");
  }
}

// Returns the token that contains the character at an offset.
function tokenAt(ends, offset) {
  let low = 0, high = ends.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > offset) high = middle; else low = middle + 1;
  }
  return low;
}

function percent(part, total) { return total ? `${Math.round(100 * part / total)} %` : "0 %"; }

function makeExample(example, number, row, title) {
  const box = make("pre", "ex");
  const countCharacters = (all) => example.sizes.reduce((sum, size, token) => sum + (all || example.isTrained[token] ? size : 0), 0);
  const [trained, total, unit] = example.ids
    ? [example.trainedCount, example.sizes.length, "tokens"]
    : [countCharacters(false), countCharacters(true), "characters"];
  const summary = `${trained.toLocaleString("en")} of ${total.toLocaleString("en")} ${unit} trained (${percent(trained, total)})`;
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `${row.name}${title ? `, ${title}` : ""}, example ${number + 1}: ${summary}; use the arrow keys to move between tokens`);
  box.example = example;
  return [box, make("p", "note", summary + (example.cut ? ` · ✂ ${example.cut.toLocaleString("en")} tokens cut` : ""))];
}

function makeNote(name, text) {
  const note = make("p", `note ${name}`);
  addText(note, text);
  return note;
}

// A badge names a flag or a kind of outlier. A click shows all rows with it, and its explanation.
function makeBadge(name, kind) {
  const badge = make("button", `badge ${name}`, kind);
  badge.type = "button";
  badge.title = (data.kinds[kind] || [])[1] || kind;
  badge.addEventListener("click", () => {
    $("kind").value = kind;
    search();
    $("kind").focus();
  });
  return badge;
}

function makeCard(row) {
  const card = make("article", "row");
  card.id = `row-${row.number}`;
  card.tabIndex = -1;
  const head = make("h3");
  head.append(row.name);
  if (row.href) {
    const link = make("a");
    addPlain(link, row.place);
    link.href = row.href;
    head.append(link);
  } else {
    const source = make("span");
    addPlain(source, row.place);
    head.append(source);
  }
  if (row.schema) head.append(make("span", "", row.schema));
  if (row.label) head.append(make("span", "", row.label));
  if (row.pack !== null) head.append(make("span", "", `pack ${row.pack}`));
  for (const kind of row.why) head.append(makeBadge("why", kind));
  for (const flag of row.flags) head.append(makeBadge("flag", flag));
  card.append(head);
  if (row.rejected) card.append(makeNote("bad", row.rejected));
  const pair = row.captions ? make("div", "pair") : null;
  row.examples.forEach((example, number) => {
    if (pair) {
      const side = make("div");
      side.append(make("h4", "", row.captions[number]), ...makeExample(example, number, row, row.captions[number]));
      pair.append(side);
    } else {
      if (row.examples.length > 1) card.append(make("h4", "part", `example ${number + 1} of ${row.examples.length}`));
      card.append(...makeExample(example, number, row));
    }
  });
  if (pair) card.append(pair);
  for (const lost of row.lost) card.append(makeNote("flag", `not printed by the template: ${lost.field}: ${lost.text}`));
  for (const difference of row.drift) card.append(makeNote("flag", `drift: ${difference}`));
  if (row.dropped.length) {
    const tokens = row.dropped.reduce((sum, length) => sum + length, 0).toLocaleString("en");
    card.append(makeNote("bad", `✂ ${row.dropped.length} examples dropped: ${tokens} tokens beyond max_length`));
  }
  return card;
}

// --- the list ------------------------------------------------------------------------------------------------------

function show(page) {
  state.page = Math.max(0, Math.min(page, Math.ceil(state.rows.length / PER_PAGE) - 1));
  const rows = state.rows.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
  const list = $("list");
  list.replaceChildren(...rows.map(makeCard));
  hideTip();
  const pages = Math.max(1, Math.ceil(state.rows.length / PER_PAGE));
  $("page").textContent = `page ${state.page + 1} of ${pages}`;
  $("prev").disabled = state.page === 0;
  $("next").disabled = state.page >= pages - 1;
  const drawing = ++state.drawing;
  const queue = [...list.querySelectorAll(".ex")].map((box) => [box.example, drawTokens(box.example, box)]);
  // The first examples are drawn immediately, the remaining ones after the browser has rendered them.
  const step = () => {
    let budget = 2;
    while (queue.length && budget > 0 && drawing === state.drawing) {
      const [example, work] = queue[0];
      if (work.next().done) {
        markHits(example);
        queue.shift();
        budget -= example.ends.length / PER_FRAME;
      } else budget -= 1;
    }
    if (drawing !== state.drawing) return;
    if (queue.length) setTimeout(step);
    else list.dataset.ready = drawing;
  };
  delete list.dataset.ready;
  step();
}

// Parses a pattern between slashes with optional flags; `m` is always set because texts have several lines.
function parsePattern(text) {
  const match = /^\/(.+)\/([imsu]*)$/s.exec(text);
  if (!match) return null;
  const flags = new Set(["g", "m", "u", ...match[2]]);
  try {
    return new RegExp(match[1], [...flags].join(""));
  } catch {
    flags.delete("u");
    return new RegExp(match[1], [...flags].join(""));
  }
}

// Returns a function that finds the ranges of an example that match a search.
function makeMatcher(text) {
  if (!text) return null;
  const pattern = parsePattern(text), query = toLower(text);
  return (example) => {
    const ranges = [];
    if (pattern) {
      for (const match of example.text.matchAll(pattern)) ranges.push([match.index, match.index + Math.max(match[0].length, 1)]);
    } else {
      for (let start = example.lower.indexOf(query); start >= 0; start = example.lower.indexOf(query, start + query.length)) ranges.push([start, start + query.length]);
    }
    const scope = $("in").value;
    return scope === "all" || !example.ends ? ranges : ranges.filter(([start]) => example.isTrained[tokenAt(example.ends, start)] === (scope === "trained" ? 1 : 0));
  };
}

function search() {
  const startTime = performance.now();
  const text = $("q").value, kind = $("kind").value, order = $("order").value;
  try {
    state.hit = makeMatcher(text);
  } catch (error) {
    $("status").textContent = `invalid regular expression: ${error.message}`;
    return;
  }
  let hits = 0;
  $("explanation").textContent = kind && data.kinds[kind][1] ? `${kind}: ${data.kinds[kind][1]}` : "";
  state.rows = data.rows.filter((row) => {
    if (kind && !row.kinds.includes(kind)) return false;
    if (!state.hit) return true;
    const exampleHits = row.examples.reduce((sum, example) => sum + state.hit(example).length, 0);
    const noteHits = $("in").value === "all" ? state.hit(row.notes).length : 0;
    hits += exampleHits + noteHits;
    return exampleHits + noteHits > 0;
  });
  const orders = { long: (a, b) => b.tokens - a.tokens, short: (a, b) => a.tokens - b.tokens, share: (a, b) => a.share - b.share };
  if (order) state.rows.sort(orders[order]);
  show(0);
  $("status").dataset.ms = (performance.now() - startTime).toFixed(1);
  const hitCount = state.hit ? `${hits.toLocaleString("en")} found in ` : "";
  const rowCount = `${state.rows.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} rows on this page`;
  $("status").textContent = `${hitCount}${rowCount}${data.status ? ` · ${data.status}` : ""}`;
}

// --- one token -----------------------------------------------------------------------------------------------------

function facts(example, token) {
  const [message, role, part] = data.owners[example.ownerOf[token]];
  const id = example.ids ? example.ids[token] : null;
  const owner = role ? `${role}, messages[${message}]${part ? `, ${part}` : ""}` : part === "scaffold" ? "the template" : part || "unknown";
  const pairs = [[example.ids ? "token" : "span", `${token} of ${example.sizes.length}`]];
  if (id !== null) pairs.push(["id", String(id)]);
  if (data.pieces[id] !== undefined) pairs.push(["piece", data.pieces[id]]);
  pairs.push(["owner", owner]);
  pairs.push(["label", example.isTrained[token] ? (id === null ? "trained" : String(id)) : "-100"]);
  if (example.isControl[token]) pairs.push(["type", example.isStop[token] ? "stop token" : "control token"]);
  return pairs;
}

function showTip(span) {
  const box = span.closest(".ex"), tip = $("tip"), pairs = facts(box.example, span.token);
  hideTip();
  span.classList.add("at");
  state.cursor = span;
  const list = make("dl");
  for (const [name, value] of pairs) {
    const description = make("dd");
    addText(description, value);
    list.append(make("dt", "", name), description);
  }
  tip.replaceChildren(list);
  tip.hidden = false;
  placeTip();
  return pairs;
}

function placeTip() {
  const span = state.cursor, tip = $("tip");
  if (!span) return;
  const rect = span.getClientRects()[0] || span.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(rect.left, innerWidth - tip.offsetWidth - 8))}px`;
  const below = rect.bottom + 6;
  tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : Math.max(4, rect.top - tip.offsetHeight - 6)}px`;
}

function hideTip() {
  $("tip").hidden = true;
  if (state.cursor) state.cursor.classList.remove("at");
  state.cursor = null;
}

function moveTo(box, token) {
  const spans = box.example.spans;
  if (!spans || !spans.length) return;
  const span = spans[Math.max(0, Math.min(token, spans.length - 1))];
  span.scrollIntoView({ block: "nearest" });
  $("announcement").textContent = `${span.textContent}: ${showTip(span).map((pair) => pair.join(" ")).join(", ")}`;
}

$("list").addEventListener("pointerover", (event) => {
  const span = event.target.closest(".t");
  if (span) showTip(span); else if (!event.target.closest(".ex")) hideTip();
});
$("list").addEventListener("pointerleave", hideTip);
$("list").addEventListener("focusout", hideTip);
addEventListener("scroll", placeTip, { passive: true });

// --- packs ---------------------------------------------------------------------------------------------------------

function drawPacks() {
  const section = $("packs-shown");
  if (!section || !data.packs) return;
  const rowNumbers = new Map();
  for (const row of data.rows) rowNumbers.set(row.key, row.number);
  const lines = data.packs.shown.map((documents, number) => {
    const line = make("div", "pack"), bar = make("span", "bar");
    const tokens = documents.reduce((sum, [length]) => sum + length, 0);
    line.append(make("b", "", `pack ${number}`), bar, make("span", "", percent(tokens, data.packs.size)));
    for (const [length, source, key] of documents) {
      const row = rowNumbers.get(key), button = make("button", row === undefined ? "doc" : "doc here");
      button.type = "button";
      button.style.flex = `0 0 ${100 * length / data.packs.size}%`;
      button.title = `${source}: ${length.toLocaleString("en")} tokens`;
      button.setAttribute("aria-label", button.title);
      if (row === undefined) button.tabIndex = -1;
      else button.addEventListener("click", () => reveal(row));
      bar.append(button);
    }
    return line;
  });
  section.replaceChildren(...lines);
}

function reveal(number) {
  $("q").value = $("kind").value = $("order").value = "";
  search();
  show(Math.floor(number / PER_PAGE));
  const card = $(`row-${number}`);
  card.scrollIntoView();
  card.focus();
}

// --- keys ----------------------------------------------------------------------------------------------------------

function focusCard(step) {
  const cards = [...document.querySelectorAll(".row")];
  const current = cards.indexOf(document.activeElement?.closest(".row"));
  const next = cards[current < 0 ? 0 : current + step];
  if (!next) return;
  next.scrollIntoView({ block: "start" });
  (next.querySelector(".ex") || next).focus({ preventScroll: true });
}

const KEYS = {
  "/": () => $("q").focus(),
  j: () => focusCard(1),
  k: () => focusCard(-1),
  "[": () => show(state.page - 1),
  "]": () => show(state.page + 1),
  b: () => $("borders").click(),
  "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("help").open) {
    if (event.key === "?") $("help").close();
    return;
  }
  if (event.key === "Escape") { document.activeElement?.blur(); hideTip(); return; }
  if (event.target.closest?.("input, select, textarea")) return;
  const box = event.target.closest?.(".ex");
  const token = box && state.cursor?.closest(".ex") === box ? state.cursor.token : -1;
  const moves = { ArrowRight: token + 1, ArrowLeft: Math.max(token - 1, 0), Home: 0, End: Infinity };
  if (box && event.key in moves) moveTo(box, moves[event.key]);
  else if (event.key in KEYS) KEYS[event.key]();
  else return;
  event.preventDefault();
});

for (const name of ["in", "kind", "order"]) $(name).addEventListener("input", search);
// A regular expression runs only on Enter: an incomplete pattern could backtrack for a very long time.
$("q").addEventListener("input", () => {
  if ($("q").value.startsWith("/")) $("status").textContent = "press Enter to search for the regular expression";
  else search();
});
$("q").addEventListener("change", search);
$("find").addEventListener("submit", (event) => event.preventDefault());
$("borders").addEventListener("change", () => $("list").classList.toggle("borders", $("borders").checked));
$("help-open").addEventListener("click", () => $("help").showModal());
$("help-close").addEventListener("click", () => $("help").close());
$("prev").addEventListener("click", () => show(state.page - 1));
$("next").addEventListener("click", () => show(state.page + 1));

function openSection() {
  const section = location.hash.length > 1 && $(decodeURIComponent(location.hash.slice(1)));
  if (section && "open" in section) section.open = true;
}
addEventListener("hashchange", openSection);
openSection();

const kinds = new Map();
for (const row of data.rows) for (const kind of row.kinds) kinds.set(kind, (kinds.get(kind) || 0) + 1);
for (const [kind, count] of [...kinds].sort()) {
  const total = data.kinds[kind][0] || count;
  const option = make("option", "", total > count ? `${kind} (${count} of ${total.toLocaleString("en")})` : `${kind} (${count})`);
  option.value = kind;
  $("kind").append(option);
}
drawPacks();
search();

"use strict";
// All texts reach the document as text nodes: nothing that a row says is ever read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const MOST = 100000, PER_PAGE = 25, PER_FRAME = 1500, PER_BLOCK = 200;
const state = { page: 0, rows: [], hit: null, cursor: null, drawing: 0 };

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Characters that show nothing, or turn what is around them, are shown by their numbers.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb]|\ud800(?![\udc00-\udfff])|\udb40[\udc00-\udfff]/g;

function addText(into, text) {
  let from = 0;
  for (const found of text.matchAll(/[\n\t]/g)) {
    addPlain(into, text.slice(from, found.index));
    const sign = make("span", "w", found[0] === "\n" ? "↵" : "⇥");
    sign.setAttribute("aria-hidden", "true");
    into.append(sign, found[0]);
    from = found.index + 1;
  }
  addPlain(into, text.slice(from));
}

function addPlain(into, text) {
  let from = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > from) into.append(text.slice(from, found.index));
    into.append(make("span", "inv", "U+" + found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
    from = found.index + found[0].length;
  }
  if (from < text.length) into.append(text.slice(from));
}

// Small letters, each where its capital stands: places in the two are the same.
function lowered(text) {
  const whole = text.toLowerCase().replaceAll("ς", "σ");
  if (whole.length === text.length) return whole;
  return Array.from(text, (char) => (char.toLowerCase().length === char.length ? char.toLowerCase() : char)).join("").replaceAll("ς", "σ");
}

// Runs [value, length, value, length, ...] become one value a token.
function unrolled(runs, size) {
  const values = new Int32Array(size);
  for (let run = 0, at = 0; run < runs.length; run += 2) {
    values.fill(runs[run], at, at + runs[run + 1]);
    at += runs[run + 1];
  }
  return values;
}

for (const [number, row] of data.rows.entries()) {
  row.number = number;
  for (const one of row.examples) {
    const size = one.sizes.length;
    one.ends = new Int32Array(size);
    let end = 0;
    for (let at = 0; at < size; at++) one.ends[at] = end += one.sizes[at];
    one.isTrained = unrolled(one.trained, size);
    one.isControl = unrolled(one.control, size);
    one.isStop = unrolled(one.stop, size);
    one.by = unrolled(one.owner, size);
    one.isNew = one.changed ? unrolled(one.changed, size) : null;
    one.learnt = one.isTrained.reduce((sum, yes) => sum + yes, 0);
    one.lower = lowered(one.text);
    one.row = row;
  }
  row.tokens = Math.max(0, ...row.examples.map((one) => one.sizes.length));
  const all = row.examples.reduce((sum, one) => sum + one.sizes.length, 0);
  row.share = all ? row.examples.reduce((sum, one) => sum + one.learnt, 0) / all : 2;
  row.beside = { text: [row.rejected, ...row.lost.map((lost) => lost.text)].join("\n") };
  row.beside.lower = lowered(row.beside.text);
}

// --- one example ---------------------------------------------------------------------------------------------------

function* drawn(one, into) {
  const { ends, isTrained, isControl, isStop, by, isNew } = one;
  one.spans = [];
  const most = one.whole ? ends.length : Math.min(ends.length, MOST);
  // A browser takes long over one paragraph of many parts: so lines come in blocks, drawn where they are looked at.
  let block = null, since = 0, broken = false, mark = null, group = null, groupOf = -1;
  for (let at = 0; at < most; at++) {
    if (!block || (at - since >= PER_BLOCK && (broken || at - since >= 10 * PER_BLOCK))) {
      block = make("div", "lines");
      into.append(block);
      since = at;
      mark = null;
      groupOf = -1;
    }
    if (isTrained[at] !== (mark !== null ? 1 : 0)) {
      mark = isTrained[at] ? make("mark", "tr") : null;
      if (mark) block.append(mark);
      groupOf = -1;
    }
    if (by[at] !== groupOf) {
      const [, role, part] = data.owners[by[at]];
      group = make("span", role && part !== "scaffold" ? "o" : part === "scaffold" ? "sc" : "");
      if (role) group.dataset.role = role;
      if (role && part !== "scaffold") group.dir = "auto";
      (mark || block).append(group);
      groupOf = by[at];
    }
    const span = make("span", "t");
    if (isControl[at]) span.classList.add("c");
    if (isStop[at]) span.classList.add("s");
    if (isNew && isNew[at]) span.classList.add("new");
    span.token = at;
    const text = one.text.slice(at ? ends[at - 1] : 0, ends[at]);
    broken = text.endsWith("\n");
    addText(span, text);
    group.append(span);
    one.spans.push(span);
    if (at % PER_FRAME === PER_FRAME - 1) yield;
  }
  if (most < ends.length) {
    const more = make("button", "", `show all ${ends.length.toLocaleString("en")} tokens`);
    more.type = "button";
    more.addEventListener("click", () => { one.whole = true; show(state.page); });
    into.append(more);
  } else if (one.rest) {
    const rest = make("span", "cut", "✂");
    addText(rest, one.rest);
    (block || into).append(rest);
  }
}

function shownHits(one) {
  for (const span of one.spans) span.classList.remove("hit");
  if (!state.hit) return;
  for (const [start, end] of state.hit(one)) {
    let at = after(one.ends, start);
    for (; at < one.spans.length && (at ? one.ends[at - 1] : 0) < end; at++) one.spans[at].classList.add("hit");
  }
}

// The first token that ends after a place in the text.
function after(ends, place) {
  let low = 0, high = ends.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > place) high = middle; else low = middle + 1;
  }
  return low;
}

function percent(part, whole) { return whole ? `${Math.round(100 * part / whole)} %` : "0 %"; }

function exampleOf(one, number, row, title) {
  const box = make("pre", "ex");
  const letters = (wanted) => one.sizes.reduce((sum, size, at) => sum + (wanted || one.isTrained[at] ? size : 0), 0);
  const [learnt, all, unit] = one.ids ? [one.learnt, one.sizes.length, "tokens"] : [letters(false), letters(true), "characters"];
  const says = `${learnt.toLocaleString("en")} of ${all.toLocaleString("en")} ${unit} trained (${percent(learnt, all)})`;
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `${row.name}${title ? `, ${title}` : ""}, example ${number + 1}: ${says}; arrow keys go from token to token`);
  box.example = one;
  return [box, make("p", "note", says + (one.cut ? ` · ✂ ${one.cut.toLocaleString("en")} tokens cut` : ""))];
}

function noteOf(name, text) {
  const note = make("p", `note ${name}`);
  addText(note, text);
  return note;
}

function cardOf(row) {
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
    const place = make("span");
    addPlain(place, row.place);
    head.append(place);
  }
  if (row.schema) head.append(make("span", "", row.schema));
  if (row.pack !== null) head.append(make("span", "", `pack ${row.pack}`));
  for (const why of row.why) head.append(make("span", "why", why));
  for (const flag of row.flags) head.append(make("span", "flag", flag));
  card.append(head);
  if (row.rejected) card.append(noteOf("bad", row.rejected));
  const pair = row.titles ? make("div", "pair") : null;
  row.examples.forEach((one, number) => {
    if (pair) {
      const side = make("div");
      side.append(make("h4", "", row.titles[number]), ...exampleOf(one, number, row, row.titles[number]));
      pair.append(side);
    } else card.append(...exampleOf(one, number, row));
  });
  if (pair) card.append(pair);
  for (const lost of row.lost) card.append(noteOf("flag", `not printed by the template: ${lost.field}: ${lost.text}`));
  if (row.dropped.length) {
    const tokens = row.dropped.reduce((sum, length) => sum + length, 0).toLocaleString("en");
    card.append(noteOf("bad", `✂ ${row.dropped.length} examples of ${tokens} tokens do not fit, and are left out`));
  }
  return card;
}

// --- the list ------------------------------------------------------------------------------------------------------

function show(page) {
  state.page = Math.max(0, Math.min(page, Math.ceil(state.rows.length / PER_PAGE) - 1));
  const some = state.rows.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
  const list = $("list");
  list.replaceChildren(...some.map(cardOf));
  hideTip();
  const pages = Math.max(1, Math.ceil(state.rows.length / PER_PAGE));
  $("page").textContent = `page ${state.page + 1} of ${pages}`;
  $("prev").disabled = state.page === 0;
  $("next").disabled = state.page >= pages - 1;
  const turn = ++state.drawing;
  const left = [...list.querySelectorAll(".ex")].map((box) => [box.example, drawn(box.example, box)]);
  // What is at the top is there at once, the rest when the browser has drawn that.
  const step = () => {
    let budget = 2;
    while (left.length && budget > 0 && turn === state.drawing) {
      const [one, work] = left[0];
      if (work.next().done) {
        shownHits(one);
        left.shift();
        budget -= one.ends.length / PER_FRAME;
      } else budget -= 1;
    }
    if (turn !== state.drawing) return;
    if (left.length) setTimeout(step);
    else list.dataset.ready = turn;
  };
  delete list.dataset.ready;
  step();
}

// What stands between slashes, with flags behind; `m` is always meant: texts have lines.
function patternOf(text) {
  const written = /^\/(.+)\/([imsu]*)$/s.exec(text);
  if (!written) return null;
  const flags = new Set(["g", "m", "u", ...written[2]]);
  try {
    return new RegExp(written[1], [...flags].join(""));
  } catch {
    flags.delete("u");
    return new RegExp(written[1], [...flags].join(""));
  }
}

function seeker(text) {
  if (!text) return null;
  const pattern = patternOf(text), wanted = lowered(text);
  return (one) => {
    const found = [];
    if (pattern) {
      for (const match of one.text.matchAll(pattern)) found.push([match.index, match.index + Math.max(match[0].length, 1)]);
    } else {
      for (let at = one.lower.indexOf(wanted); at >= 0; at = one.lower.indexOf(wanted, at + wanted.length)) found.push([at, at + wanted.length]);
    }
    const where = $("in").value;
    return where === "all" || !one.ends ? found : found.filter(([start]) => one.isTrained[after(one.ends, start)] === (where === "trained" ? 1 : 0));
  };
}

function search() {
  const began = performance.now();
  const text = $("q").value, kind = $("kind").value, order = $("order").value;
  try {
    state.hit = seeker(text);
  } catch (error) {
    $("status").textContent = `no regular expression: ${error.message}`;
    return;
  }
  let hits = 0;
  state.rows = data.rows.filter((row) => {
    if (kind && !row.kinds.includes(kind)) return false;
    if (!state.hit) return true;
    const own = row.examples.reduce((sum, one) => sum + state.hit(one).length, 0);
    const beside = $("in").value === "all" ? state.hit(row.beside).length : 0;
    hits += own + beside;
    return own + beside > 0;
  });
  const orders = { long: (a, b) => b.tokens - a.tokens, short: (a, b) => a.tokens - b.tokens, share: (a, b) => a.share - b.share };
  if (order) state.rows.sort(orders[order]);
  show(0);
  const took = performance.now() - began;
  $("status").dataset.ms = took.toFixed(1);
  const said = state.hit ? `${hits.toLocaleString("en")} found in ` : "";
  $("status").textContent = `${said}${state.rows.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} rows here${data.said ? ` · ${data.said}` : ""}`;
}

// --- one token -----------------------------------------------------------------------------------------------------

function facts(one, at) {
  const [message, role, part] = data.owners[one.by[at]];
  const id = one.ids ? one.ids[at] : null;
  const owner = role ? `${role}, messages[${message}]${part ? `, ${part}` : ""}` : part === "scaffold" ? "the template" : part || "not known";
  const found = [[one.ids ? "token" : "stretch", `${at} of ${one.sizes.length}`]];
  if (id !== null) found.push(["id", String(id)]);
  if (data.pieces[id] !== undefined) found.push(["piece", data.pieces[id]]);
  found.push(["owner", owner]);
  found.push(["label", one.isTrained[at] ? (id === null ? "trained" : String(id)) : "-100"]);
  if (one.isControl[at]) found.push(["is", one.isStop[at] ? "a stop token" : "a control token"]);
  return found;
}

function showTip(span) {
  const box = span.closest(".ex"), tip = $("tip"), found = facts(box.example, span.token);
  hideTip();
  span.classList.add("at");
  state.cursor = span;
  const list = make("dl");
  for (const [name, value] of found) {
    const said = make("dd");
    addText(said, value);
    list.append(make("dt", "", name), said);
  }
  tip.replaceChildren(list);
  tip.hidden = false;
  placeTip();
  return found;
}

function placeTip() {
  const span = state.cursor, tip = $("tip");
  if (!span) return;
  const place = span.getClientRects()[0] || span.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  const below = place.bottom + 6;
  tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : Math.max(4, place.top - tip.offsetHeight - 6)}px`;
}

function hideTip() {
  $("tip").hidden = true;
  if (state.cursor) state.cursor.classList.remove("at");
  state.cursor = null;
}

function moveTo(box, at) {
  const spans = box.example.spans;
  if (!spans || !spans.length) return;
  const span = spans[Math.max(0, Math.min(at, spans.length - 1))];
  span.scrollIntoView({ block: "nearest" });
  $("said").textContent = `${span.textContent}: ${showTip(span).map((pair) => pair.join(" ")).join(", ")}`;
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
  const home = $("packs-shown");
  if (!home || !data.packs) return;
  const where = new Map();
  for (const row of data.rows) where.set(row.key, row.number);
  const made = data.packs.shown.map((documents, number) => {
    const line = make("div", "pack"), bar = make("span", "bar");
    const filled = documents.reduce((sum, [length]) => sum + length, 0);
    line.append(make("b", "", `pack ${number}`), bar, make("span", "", percent(filled, data.packs.size)));
    for (const [length, place, key] of documents) {
      const here = where.get(key), part = make("button", here === undefined ? "doc" : "doc here");
      part.type = "button";
      part.style.flex = `0 0 ${100 * length / data.packs.size}%`;
      part.title = `${place}: ${length.toLocaleString("en")} tokens`;
      part.setAttribute("aria-label", part.title);
      if (here === undefined) part.tabIndex = -1;
      else part.addEventListener("click", () => reveal(here));
      bar.append(part);
    }
    return line;
  });
  home.replaceChildren(...made);
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

function besideCard(step) {
  const cards = [...document.querySelectorAll(".row")];
  const at = cards.indexOf(document.activeElement?.closest(".row"));
  const next = cards[at < 0 ? 0 : at + step];
  if (!next) return;
  next.scrollIntoView({ block: "start" });
  (next.querySelector(".ex") || next).focus({ preventScroll: true });
}

const KEYS = {
  "/": () => $("q").focus(),
  j: () => besideCard(1),
  k: () => besideCard(-1),
  "[": () => show(state.page - 1),
  "]": () => show(state.page + 1),
  b: () => $("borders").click(),
  "?": () => { $("help").open = !$("help").open; $("help").scrollIntoView(); },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { document.activeElement?.blur(); hideTip(); return; }
  if (event.target.closest?.("input, select, textarea")) return;
  const box = event.target.closest?.(".ex");
  const at = box && state.cursor?.closest(".ex") === box ? state.cursor.token : -1;
  const moves = { ArrowRight: at + 1, ArrowLeft: Math.max(at - 1, 0), Home: 0, End: Infinity };
  if (box && event.key in moves) moveTo(box, moves[event.key]);
  else if (event.key in KEYS) KEYS[event.key]();
  else return;
  event.preventDefault();
});

for (const name of ["in", "kind", "order"]) $(name).addEventListener("input", search);
// A pattern is looked for when it is whole: half of one may take for ever.
$("q").addEventListener("input", () => {
  if ($("q").value.startsWith("/")) $("status").textContent = "press Enter to look for the regular expression";
  else search();
});
$("q").addEventListener("change", search);
$("find").addEventListener("submit", (event) => event.preventDefault());
$("borders").addEventListener("change", () => $("list").classList.toggle("borders", $("borders").checked));
$("prev").addEventListener("click", () => show(state.page - 1));
$("next").addEventListener("click", () => show(state.page + 1));

function unfold() {
  const section = location.hash.length > 1 && $(decodeURIComponent(location.hash.slice(1)));
  if (section && "open" in section) section.open = true;
}
addEventListener("hashchange", unfold);
unfold();

const kinds = new Map();
for (const row of data.rows) for (const kind of row.kinds) kinds.set(kind, (kinds.get(kind) || 0) + 1);
for (const [kind, count] of [...kinds].sort()) {
  const option = make("option", "", `${kind} (${count})`);
  option.value = kind;
  $("kind").append(option);
}
drawPacks();
search();

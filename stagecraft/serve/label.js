"use strict";
// One page of labelling. Texts of models are only ever text: nothing here parses HTML.

const $ = (id) => document.getElementById(id);
const tab = crypto.getRandomValues(new Uint32Array(4)).join("-");
const KEYS = { " ": "tie", b: "both_bad", s: "skip", u: "undo", Backspace: "undo" };
for (let key = 1; key <= 9; key++) KEYS[key] = `answer-${key - 1}`;
// What changes how the rest is read, or is not seen: bidi controls, zero widths, controls;
// joiners only where they join nothing (emoji and some scripts need them).
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f" +
  "\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}]|" +
  "(?<![\\p{Extended_Pictographic}\\p{Emoji_Modifier}\\p{M}]|(?!\\p{Script=Latin})\\p{L})[\\u200c\\u200d]", "gu");
const PLACES = ["1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th"];
let rater = "", shown = null, since = 0, busy = false;
let picks = []; // of more than two answers: the best so far, in their order

function write(element, text) {
  element.replaceChildren();
  let at = 0;
  for (const hit of text.matchAll(HIDDEN)) {
    element.append(text.slice(at, hit.index));
    const mark = document.createElement("span");
    mark.className = "mark";
    mark.textContent = "U+" + hit[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    mark.title = "a character that is not seen";
    element.append(mark);
    at = hit.index + hit[0].length;
  }
  element.append(text.slice(at));
}

function writePrompt(prompt) {
  const element = $("prompt");
  if (typeof prompt === "string") return write(element, prompt);
  element.replaceChildren();
  for (const turn of prompt) {
    const role = document.createElement("span"), text = document.createElement("span");
    role.className = "role";
    write(role, String(turn.role));
    write(text, typeof turn.content === "string" ? turn.content : JSON.stringify(turn.content));
    element.append(role, text, "\n");
  }
}

function say(text) {
  $("message").hidden = !text;
  $("message").textContent = text;
}

async function call(path, body) {
  const answer = await fetch(path, {
    method: "POST", credentials: "same-origin",
    headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  const value = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(value.error || `the server answered ${answer.status}`);
  return value;
}

function build(answers) {
  $("answers").replaceChildren();
  $("verdicts").replaceChildren();
  const several = answers.length > 2;
  answers.forEach((answer, side) => {
    const section = $("answer").content.firstElementChild.cloneNode(true);
    const text = section.querySelector(".text"), cut = section.querySelector(".cut");
    section.setAttribute("aria-labelledby", `title-${side}`);
    section.querySelector("h2").id = `title-${side}`;
    section.querySelector(".name").textContent = `Answer ${side + 1}`;
    text.id = `answer-${side}`;
    cut.id = `cut-${side}`;
    cut.hidden = answer.ended;
    write(text, answer.text);
    $("answers").append(section);
    button(`answer-${side}`, `Answer ${side + 1}`, String(side + 1), side + 1);
  });
  const tie = button("tie", several ? "Rest equal" : "Equal", "space", "Space");
  if (!several) $("verdicts").insertBefore(tie, $("verdicts").lastChild.previousSibling);
  $("answers").classList.toggle("several", several);
  $("verdicts").classList.toggle("several", several);
  $("strengths").hidden = several;
  $("bad").textContent = several ? "All bad" : "Both bad";
  $("more").textContent = several ? "Why (optional)" : "By how much, and why (optional)";
}

function button(choice, name, key, shortcut) {
  const made = document.createElement("button"), kbd = document.createElement("kbd");
  made.dataset.choice = choice;
  made.setAttribute("aria-keyshortcuts", shortcut);
  kbd.textContent = key;
  made.append(`${name} `, kbd);
  made.addEventListener("click", () => choose(choice));
  $("verdicts").append(made);
  return made;
}

function mark() {
  $("answers").querySelectorAll("section").forEach((section, side) => {
    const place = picks.indexOf(side);
    section.classList.toggle("picked", place >= 0);
    section.querySelector(".place").textContent = place >= 0 ? PLACES[place] : "";
    const made = document.querySelector(`button[data-choice=answer-${side}]`);
    if (made && place >= 0 && document.activeElement === made) $("asked-title").focus({ preventScroll: true });
    if (made) made.disabled = place >= 0;
  });
  const last = picks[picks.length - 1];
  $("picked").textContent = shown === null || shown.answers.length < 3 ? ""
    : picks.length ? `Answer ${last + 1} is ${PLACES[picks.length - 1]}. Which is next?` : "Which is the best?";
}

function show(state) {
  shown = state.place === null ? null : state;
  picks = [];
  $("progress").textContent = `${state.done} of ${state.total} done`;
  $("bar").max = state.total;
  $("bar").value = state.done;
  $("pair").hidden = $("choices").hidden = false;
  if (shown !== null) build(state.answers);
  for (const made of $("choices").querySelectorAll("button"))
    made.disabled = shown === null && made.dataset.choice !== "undo";
  mark();
  if (shown === null) {
    $("pair").hidden = true;
    say(state.done < state.total ? "The rest is open in another tab." : "All done. Thank you. This page may be closed.");
    return;
  }
  writePrompt(state.prompt);
  $("reason").value = "";
  document.querySelector("input[name=strength][value='']").checked = true;
  $("asked-title").focus({ preventScroll: true });
  window.scrollTo(0, 0);
  since = performance.now();
}

// What a key or a button means: a verdict of the server's, or none yet.
function meaning(choice) {
  const count = shown.answers.length, side = choice.startsWith("answer-") ? Number(choice.slice(7)) : -1;
  if (side >= count || picks.includes(side)) return null;
  if (side < 0) return choice === "tie" && picks.length ? { choice: "rank", order: picks } : { choice };
  if (count === 2) return { choice: ["first", "second"][side] };
  picks.push(side);
  mark();
  return picks.length < count - 1 ? null : { choice: "rank", order: picks };
}

async function choose(choice) {
  if (busy || !rater || (shown === null && choice !== "undo")) return;
  if (choice === "undo" && picks.length) {
    picks.pop();
    return mark();
  }
  const said = choice === "undo" ? {} : meaning(choice);
  if (said === null) return;
  busy = true;
  say("");
  try {
    if (choice === "undo") show(await call("/undo", { rater, tab }));
    else {
      const strength = document.querySelector("input[name=strength]:checked").value;
      show(await call("/verdict", {
        rater, tab, place: shown.place, ...said, strength: strength ? Number(strength) : null,
        reason: $("reason").value, seconds: (performance.now() - since) / 1000,
      }));
    }
  } catch (error) {
    say(`Not stored: ${error.message}. Try again.`);
    if (picks.length) picks.pop();
    mark();
    // Another tab may have answered this one.
    if (String(error.message).includes("verdict")) show(await call("/next", { rater, tab }));
  } finally {
    busy = false;
  }
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const on = event.target;
  if (on.closest("input, textarea, select, summary")) return;
  // Space and Enter on a button press that button.
  if (on.closest("button") && (event.key === " " || event.key === "Enter")) return;
  const choice = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!choice || $("choices").hidden) return;
  event.preventDefault();
  choose(choice);
});

for (const button of $("choices").querySelectorAll("button"))
  button.addEventListener("click", () => choose(button.dataset.choice));

$("who").addEventListener("submit", async (event) => {
  event.preventDefault();
  const name = $("rater").value.trim();
  if (!name) return;
  try {
    const state = await call("/next", { rater: name, tab });
    rater = name;
    sessionStorage.setItem("rater", name);
    $("who").hidden = true;
    say("");
    show(state);
  } catch (error) {
    say(error.message);
  }
});

async function begin() {
  const token = location.hash.slice(1);
  if (token) {
    history.replaceState(null, "", location.pathname); // out of the address
    try {
      await call("/session", { token });
    } catch (error) {
      return say(error.message);
    }
  }
  $("who").hidden = false;
  $("rater").value = sessionStorage.getItem("rater") || "";
  $("rater").focus();
}
begin();

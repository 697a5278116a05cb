"use strict";
// One page of labelling. Texts of models are only ever text: nothing here parses HTML.

const $ = (id) => document.getElementById(id);
const tab = crypto.getRandomValues(new Uint32Array(4)).join("-");
const KEYS = { "1": "first", "2": "second", " ": "tie", b: "both_bad", s: "skip", u: "undo", Backspace: "undo" };
// What changes how the rest is read, or is not seen: bidi controls, zero widths, controls;
// joiners only where they join nothing (emoji and some scripts need them).
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f" +
  "\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}]|" +
  "(?<![\\p{Extended_Pictographic}\\p{Emoji_Modifier}\\p{M}]|(?!\\p{Script=Latin})\\p{L})[\\u200c\\u200d]", "gu");
let rater = "", shown = null, since = 0, busy = false;

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

function show(state) {
  shown = state.place === null ? null : state;
  $("progress").textContent = `${state.done} of ${state.total} done`;
  $("bar").max = state.total;
  $("bar").value = state.done;
  $("pair").hidden = $("choices").hidden = false;
  for (const button of $("choices").querySelectorAll("button"))
    button.disabled = shown === null && button.dataset.choice !== "undo";
  if (shown === null) {
    $("pair").hidden = true;
    say(state.done < state.total ? "The rest is open in another tab." : "All done. Thank you. This page may be closed.");
    return;
  }
  writePrompt(state.prompt);
  state.answers.forEach((answer, side) => {
    write($(`answer-${side}`), answer.text);
    $(`answer-${side}`).scrollTop = 0;
    $(`cut-${side}`).hidden = answer.ended;
  });
  $("reason").value = "";
  document.querySelector("input[name=strength][value='']").checked = true;
  $("asked-title").focus({ preventScroll: true });
  window.scrollTo(0, 0);
  since = performance.now();
}

async function choose(choice) {
  if (busy || !rater || (shown === null && choice !== "undo")) return;
  busy = true;
  say("");
  try {
    if (choice === "undo") show(await call("/undo", { rater, tab }));
    else {
      const strength = document.querySelector("input[name=strength]:checked").value;
      show(await call("/verdict", {
        rater, tab, place: shown.place, choice, strength: strength ? Number(strength) : null,
        reason: $("reason").value, seconds: (performance.now() - since) / 1000,
      }));
    }
  } catch (error) {
    say(`Not stored: ${error.message}. Try again.`);
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

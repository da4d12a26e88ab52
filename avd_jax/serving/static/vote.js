"use strict";
// A voter's page: one pair at a time. Texts enter as text, never as HTML.
const SILENT = "The server does not answer. What you confirmed is kept; try again in a moment.";
const videos = [$("first"), $("second")];
const LABELS = { first: "Video 1", comparable: "Comparable", second: "Video 2" };
let questions = {}, answers = {}, pair = null, busy = false;

function name() {
  try { return localStorage.getItem("annotator") || ""; } catch { return $("name").value; }
}

function showStart() {
  pair = null;
  $("pair").hidden = $("done").hidden = true;
  $("start").hidden = false;
  $("name").focus();
}

function show(next) {
  $("start").hidden = true;
  $("done").hidden = "pair" in next;
  $("pair").hidden = !("pair" in next);
  pair = next.pair || null;
  if (!pair) return;
  answers = {};
  $("count").textContent = `pair ${next.done + 1} of ${next.of}`;
  $("who").textContent = name();
  $("progress").value = next.of ? next.done / next.of : 0;
  $("prompt").textContent = next.prompt;
  $("skip").hidden = true;
  videos.forEach((video, i) => { video.src = next.videos[i]; });
  playBoth();
  mark();
  scrollTo(0, 0);
}

function playBoth() {
  for (const video of videos) {
    video.currentTime = 0;
    video.play().catch(() => {});
  }
}

function mark() {
  for (const button of document.querySelectorAll("[data-question]")) {
    button.setAttribute("aria-pressed", answers[button.dataset.question] === button.dataset.answer);
  }
  $("send").disabled = busy || Object.keys(questions).some((question) => !answers[question]);
}

async function turn(path, more) {
  if (busy) return;
  busy = true;
  mark();
  try {
    const next = await ask(path, { annotator: name(), ...more });
    say("");
    busy = false;
    show(next);
  } catch (error) {
    say(error.message);
    if ($("pair").hidden) showStart();
  } finally {
    busy = false;
    mark();
  }
}

function makeQuestions() {
  for (const [question, text] of Object.entries(questions)) {
    const title = document.createElement("p");
    title.textContent = text;
    const choice = document.createElement("div");
    choice.className = "choice";
    for (const [answer, label] of Object.entries(LABELS)) {
      const button = document.createElement("button");
      Object.assign(button.dataset, { question, answer });
      button.type = "button";
      button.textContent = label;
      button.onclick = () => { answers[question] = answer; mark(); };
      choice.append(button);
    }
    $("questions").append(title, choice);
  }
}

$("start").onsubmit = (event) => {
  event.preventDefault();
  try { localStorage.setItem("annotator", $("name").value); } catch { /* it is asked for again after a reload */ }
  turn("next");
};
$("other").onclick = () => { showStart(); };
$("again").onclick = playBoth;
$("send").onclick = () => turn("vote", { pair, ...answers });
$("skip").onclick = () => turn("skip", { pair });
for (const video of videos) {
  video.onloadedmetadata = () => video.parentElement.parentElement.style.setProperty(
    "--aspect", `${video.videoWidth} / ${video.videoHeight}`);
  video.onerror = () => {
    say("A video of this pair cannot be played here. Tell whoever sent you this page, and go on with the next pair.");
    $("skip").hidden = false;
  };
}

ask("about").then((about) => {
  questions = about.questions;
  makeQuestions();
  $("name").value = name();
  if (name()) turn("next"); else showStart();
}).catch((error) => say(error.message));

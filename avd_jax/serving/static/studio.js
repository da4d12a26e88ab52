"use strict";
// The page of prompts: texts enter as text, never as HTML.
const SILENT = "The server does not answer.";
const WHOLE = ["seed", "frames", "height", "width", "steps"];
let about = {}, watched = null, shown = 0;

function element(tag, text) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  return made;
}

function card(entry, autoplay) {
  const figure = element("figure"), video = element("video"), caption = element("figcaption");
  // The fragment makes phones show a frame before it plays.
  Object.assign(video, { src: `${entry.video}#t=0.01`, muted: true, loop: true, playsInline: true, preload: "metadata" });
  video.controls = true;
  video.style.setProperty("--aspect", `${entry.size[2]} / ${entry.size[1]}`);
  if (autoplay) video.autoplay = true;
  const record = element("a", "JSON"), again = element("button", "use again");
  record.href = entry.record;
  record.target = "_blank";
  again.type = "button";
  again.onclick = () => {
    $("prompt").value = entry.prompt;
    $("seed").value = entry.seed;
    ["frames", "height", "width"].forEach((name, i) => { $(name).value = entry.size[i]; });
    scrollTo(0, 0);
  };
  const seconds = entry.seconds ? `, ${entry.seconds} s` : "";
  caption.append(element("div", entry.prompt), element("div", `${entry.about}; seed ${entry.seed}${seconds}`), record,
    document.createTextNode(" "), again);
  figure.append(video, caption);
  return figure;
}

async function showGallery() {
  const entries = await ask("gallery");
  $("gallery").replaceChildren(...entries.map((entry) => card(entry, false)));
  $("none").hidden = entries.length > 0;
}

function showState(state) {
  $("job").hidden = false;
  $("cancel").hidden = state.status !== "waiting";
  const words = {
    waiting: `waiting: number ${state.ahead} in the queue`,
    working: state.step && state.step < state.steps ? `${state.doing}, step ${state.step} of ${state.steps}` : state.doing,
    done: "done", failed: "", cancelled: "cancelled",
  };
  $("doing").textContent = words[state.status];
  if (state.status === "working" && !state.step) $("progress").removeAttribute("value");
  else $("progress").value = state.status === "waiting" ? 0 : state.steps ? state.step / state.steps : 1;
  $("progress").hidden = ["failed", "cancelled", "done"].includes(state.status);
  $("notes").textContent = [...new Set(state.notes)].join(" · ");
  for (const result of state.results.slice(shown)) $("results").append(card(result, true));
  shown = state.results.length;
  if (state.status === "failed") say(state.message);
}

async function watch(job) {
  watched = job;
  while (watched === job) {
    try {
      const state = await ask("state", { job });
      if (watched !== job) return;
      showState(state);
      if (!["waiting", "working"].includes(state.status)) {
        await showGallery();
        return;
      }
      say("");
    } catch (error) {
      say(error.message);
      if (error.told) return;
    }
    await new Promise((done) => setTimeout(done, 400));
  }
}

$("form").onsubmit = async (event) => {
  event.preventDefault();
  const wish = { prompt: $("prompt").value, models: $("models").value.split(","), half_rate: $("half_rate").checked };
  for (const name of WHOLE) wish[name] = Number($(name).value);
  $("send").disabled = true;
  try {
    const { job } = await ask("make", wish);
    say("");
    shown = 0;
    $("results").replaceChildren();
    watch(job);
  } catch (error) {
    say(error.message);
  } finally {
    $("send").disabled = false;
  }
};
$("cancel").onclick = () => ask("cancel", { job: watched }).then(showState).catch((error) => say(error.message));
$("models").onchange = () => {
  $("steps_label").hidden = !$("models").value.includes("teacher");
  $("half_rate_label").hidden = !about.half_rate || !$("models").value.includes("student");
};

ask("about").then((told) => {
  about = told;
  const choices = [...about.models, ...(about.models.length > 1 ? [about.models.join(",")] : [])];
  for (const choice of choices) {
    const option = element("option", choice.replace(",", " and "));
    option.value = choice;
    $("models").append(option);
  }
  for (const name of ["frames", "height", "width", "steps"]) $(name).value = about[name];
  $("steps").max = about.most_steps;
  $("seed").max = about.most_seed;
  $("models").onchange();
  return showGallery();
}).catch((error) => say(error.message));

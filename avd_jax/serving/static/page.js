"use strict";
// What all pages share. Texts enter as text, never as HTML.
const $ = (id) => document.getElementById(id);

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// Returns what the server answers; an error with `told` is one that it has told.
async function ask(path, body) {
  const options = body && {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let reply, content;
  try {
    reply = await fetch(path, options);
    content = await reply.json();
  } catch {
    throw new Error(SILENT);
  }
  if (!reply.ok) throw Object.assign(new Error(content.error), { told: true });
  return content;
}

"use strict";
// Everything that came by mail enters the page as text; an HTML body only through a sandboxed frame with its own policy.

const POLL_MS = 1000;
const SHOWN_MOST = 500;
const find = (id) => document.getElementById(id);
const mails = []; // newest first
let arrived = -1;
let chosen = null;
let view = null;

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.json()).detail);
  return answer.json();
}

async function poll() {
  try {
    let found = await ask(`api/messages?limit=${SHOWN_MOST}&after=${Math.max(arrived, 0)}`);
    if (found.arrived < arrived) { // the mailbox was started anew
      mails.length = 0;
      found = await ask(`api/messages?limit=${SHOWN_MOST}`);
    }
    if (found.arrived !== arrived) {
      arrived = found.arrived;
      mails.unshift(...found.messages);
      mails.length = Math.min(mails.length, SHOWN_MOST);
      list();
    }
    say(`${arrived} arrived` + (arrived > mails.length ? `, the newest ${mails.length} shown` : ""), false);
    document.title = arrived ? `(${arrived}) Mailbox` : "Mailbox";
    find("empty").hidden = mails.length > 0;
  } catch {
    say("The mailbox does not answer; trying again", true);
  }
  setTimeout(poll, POLL_MS);
}

function say(text, lost) {
  const state = find("state");
  if (state.textContent !== text) state.textContent = text;
  state.className = lost ? "lost" : "";
}

function list() {
  const words = find("filter").value.toLowerCase().split(/\s+/);
  const fits = (mail) => {
    const text = [mail.from, mail.to, mail.subject, mail.message_id, mail.sender, ...mail.recipients].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  };
  find("list").replaceChildren(...mails.filter(fits).map((mail) => {
    const at = new Date(mail.at);
    const button = make("button", { type: "button", onclick: () => { location.hash = mail.n; } },
      make("span", { className: "to", textContent: mail.recipients.join(", "), title: mail.recipients.join(", ") }),
      make("time", { dateTime: mail.at, textContent: at.toLocaleTimeString(), title: at.toLocaleString() }),
      make("span", { className: "subject", textContent: mail.subject || "(no subject)" }));
    if (mail.n === chosen) button.setAttribute("aria-current", "true");
    button.dataset.n = mail.n;
    return make("li", {}, button);
  }));
}

async function choose() {
  chosen = Number(location.hash.slice(1)) || null;
  list();
  let mail = null;
  try {
    if (chosen) mail = await ask(`api/messages/${chosen}`);
  } catch (error) {
    say(error.message, true);
  }
  if (mail !== null && mail.n !== chosen) return; // another one was chosen in between
  find("message").hidden = mail === null;
  find("none").hidden = mail !== null;
  if (mail !== null) show(mail);
}

function show(mail) {
  find("subject").textContent = mail.subject || "(no subject)";
  const facts = {
    From: mail.from, To: mail.to, "Envelope from": mail.sender || "<>", "Envelope to": mail.recipients.join(", "),
    Arrived: new Date(mail.at).toLocaleString(), "Message-ID": mail.message_id || "none", Size: `${mail.size_bytes} bytes`,
  };
  find("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) =>
    [make("dt", { textContent: name }), make("dd", { textContent: value })]));
  const views = {
    HTML: mail.html === null ? null : () => frame(`messages/${mail.n}/html`),
    Text: mail.text === null ? null : () => make("pre", { textContent: mail.text }),
    Headers: () => table(mail.headers),
    Attachments: mail.attachments.length === 0 ? null : () => table(mail.attachments.map((part) =>
      [part.name || "(no name)", `${part.type}, ${part.size_bytes} bytes`])),
    Source: () => frame(`messages/${mail.n}/raw`),
  };
  const names = Object.keys(views).filter((name) => views[name]);
  const open = (name) => {
    view = name;
    for (const tab of find("views").children) tab.setAttribute("aria-selected", String(tab.textContent === name));
    find("view").replaceChildren(views[name]());
  };
  find("views").replaceChildren(...names.map((name) => {
    const tab = make("button", { type: "button", textContent: name, onclick: () => open(name) });
    tab.setAttribute("role", "tab");
    return tab;
  }));
  open(names.includes(view) ? view : names[0]);
}

function frame(address) {
  const element = make("iframe", { src: address, title: "The message" });
  element.setAttribute("sandbox", "");
  return element;
}

function table(rows) {
  return make("table", {}, ...rows.map(([name, value]) =>
    make("tr", {}, make("td", { textContent: name }), make("td", { textContent: value }))));
}

document.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || event.target.id === "filter") return;
  const buttons = [...find("list").querySelectorAll("button")];
  const now = buttons.findIndex((button) => Number(button.dataset.n) === chosen);
  const next = buttons[Math.min(Math.max(now + step, 0), buttons.length - 1)];
  if (next) {
    event.preventDefault();
    location.hash = next.dataset.n;
    next.scrollIntoView({ block: "nearest" });
  }
});
find("filter").addEventListener("input", list);
addEventListener("hashchange", choose);
poll();
choose();

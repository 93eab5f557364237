"use strict";
// As much of a document as cola_ray's page asks for: its script runs, is clicked and filtered, without a browser.
//   node page_dom.js PAGE '["click .token", "key .token=End", "input #text=7", ...]'   prints the text of the page after each act, as JSON
const fs = require("fs");
const vm = require("vm");

let focused = null;

class Element {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, nodes: [], listeners: {}, value: "", hidden: false });
    this.style = { setProperty: (name, value) => { this.attributes[name] = value; } };
  }
  get children() { return this.nodes.filter((node) => node instanceof Element); }
  get textContent() { return this.nodes.map((node) => (node instanceof Element ? node.textContent : node)).join(""); }
  set textContent(text) { this.nodes = [text]; }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  append(...nodes) { this.nodes.push(...nodes.map((node) => (node instanceof Element ? node : String(node)))); }
  replaceChildren(...nodes) { this.nodes = []; this.append(...nodes); }
  addEventListener(name, listener) { (this.listeners[name] = this.listeners[name] || []).push(listener); }
  dispatch(name, target, key) {
    for (const listener of this.listeners[name] || []) listener({ target: target || this, key, preventDefault() {} });
  }
  focus() { focused = this; }
  all() { return [this, ...this.children.flatMap((child) => child.all())]; }
  is(selector) {
    if (selector[0] === "#") return this.attributes.id === selector.slice(1);
    if (selector[0] === ".") return (this.attributes.class || "").split(" ").includes(selector.slice(1));
    return this.tag === selector;
  }
}

const html = fs.readFileSync(process.argv[2], "utf8");
const body = new Element("body");
const open = [body];
for (const [, closes, tag, attributes, text] of html.matchAll(/<(\/?)(\w+)([^>]*)>([^<]*)/g)) {
  if (["html", "head", "body", "meta"].includes(tag)) continue;
  if (closes) open.pop();
  else {
    const element = new Element(tag);
    for (const [, name, value] of attributes.matchAll(/([\w-]+)(?:="([^"]*)")?/g)) element.setAttribute(name, value || "");
    open[open.length - 1].append(element);
    if (tag !== "input") open.push(element);
    if (tag === "script") element.append(text);
  }
}
const document = {
  createElement: (tag) => new Element(tag),
  createElementNS: (_, tag) => new Element(tag),
  getElementById: (id) => body.all().find((element) => element.attributes.id === id),
};
vm.runInNewContext(html.slice(html.lastIndexOf("<script>") + 8, html.lastIndexOf("</script>")), { document });

const shown = () => ({
  groups: body.all().filter((element) => element.is(".group")).map((element) => element.textContent),
  count: document.getElementById("count").textContent,
  pressed: body.all().filter((element) => element.attributes["aria-pressed"] === "true").length,
  choices: body.all().filter((element) => element.is(".choice")).map((element) => element.textContent),
  curves: body.all().filter((element) => element.is("figcaption")).map((element) => element.children[0].textContent),
  unseen: body.all().filter((element) => element.is(".unseen") && element.attributes.dir === "ltr").map((element) => element.textContent),
  stops: body.all().filter((element) => element.attributes.tabindex === "0").length,
  focused: focused && focused.textContent,
  given: body.all().filter((element) => element.is(".given")).map((element) => element.textContent),
  more: !document.getElementById("more").hidden,
  steps: ["left", "right"].map((id) => document.getElementById(id).value),
});
const found = [shown()];
for (const act of JSON.parse(process.argv[3] || "[]")) {
  const [, kind, selector, value] = act.match(/^(\w+) ([^=]+)(?:=(.*))?$/);
  const element = body.all().find((one) => one.is(selector));
  if (kind === "input") {
    element.value = value;
    document.getElementById("filters").dispatch("input", element);
  } else if (kind === "toggle") body.all().filter((one) => one.is(selector)).forEach((one) => one.dispatch("toggle"));
  else if (kind === "key") (focused || element).dispatch("keydown", null, value);
  else element.dispatch(kind);
  found.push(shown());
}
process.stdout.write(JSON.stringify(found));

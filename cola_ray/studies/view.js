"use strict";
// Texts reach the page as text alone: nothing here makes markup of a string.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 20; // prompts at once
  const MAIN = ["reward/mean", "eval/accuracy", "eval/return", "eval/reward", "policy/kl", "policy/entropy",
    "rollout/response_length", "time/step"];
  const KINDS = { train: "training", eval: "evaluations", base: "the bare base" };
  // Control characters, and those that reverse or hide what stands beside them, by their numbers.
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g;

  function visible(text) {
    return text.replace(UNSEEN, (one) => "\\u" + one.charCodeAt(0).toString(16).padStart(4, "0"));
  }

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function draw(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function number(value, digits = 3) {
    if (value === null) return "none";
    const whole = Math.abs(value) >= 10 ** digits && Math.abs(value) < 1e9;
    return String(whole ? Math.round(value) : Number(value.toPrecision(digits)));
  }

  // A text as nodes. An escape is an element of its own, which text from right to left cannot take apart.
  function nodes(text) {
    const found = [];
    let from = 0;
    for (const match of text.matchAll(UNSEEN)) {
      found.push(text.slice(from, match.index), make("span", { class: "unseen", dir: "ltr" }, visible(match[0])));
      from = match.index + match[0].length;
    }
    return [...found, text.slice(from)].filter((node) => node !== "");
  }

  function byId(id) {
    return document.getElementById(id);
  }

  // --- the run and its curves

  for (const [name, value] of Object.entries(data.run)) {
    byId("run").append(make("div", {}, make("dt", {}, name), make("dd", {}, visible(String(value)))));
  }

  function curve(name, steps, values) {
    const points = steps.map((step, i) => [step, values[i]]).filter(([, value]) => value !== null);
    const [low, high] = [Math.min(...points.map(([, y]) => y)), Math.max(...points.map(([, y]) => y))];
    const [first, last] = [points[0][0], points[points.length - 1][0]];
    const x = (step) => 50 + (last > first ? (246 * (step - first)) / (last - first) : 123);
    const y = (value) => 92 - (high > low ? (84 * (value - low)) / (high - low) : 42);
    const at = ([step, value]) => x(step).toFixed(1) + " " + y(value).toFixed(1);
    const line = draw("path", { d: "M" + points.map(at).join("L") });
    const dots = points.length > 80 ? [] : points.map(([step, value]) =>
      draw("circle", { cx: x(step).toFixed(1), cy: y(value).toFixed(1), r: 2.2 },
        draw("title", {}, "step " + step + ": " + number(value, 5))));
    const label = (left, top, text, anchor) =>
      draw("text", { x: left, y: top, "text-anchor": anchor }, text);
    const told = name + ", from " + number(points[0][1]) + " to " + number(points[points.length - 1][1]);
    return make("figure", { class: "curve" },
      make("figcaption", {}, make("span", {}, visible(name)), make("span", {}, number(points[points.length - 1][1]))),
      draw("svg", { viewBox: "0 0 300 112", role: "img", "aria-label": visible(told) },
        draw("line", { x1: 50, x2: 296, y1: 96, y2: 96 }), line, ...dots,
        ...(last > first ? [label(50, 108, "step " + first, "start"), label(296, 108, String(last), "end")]
          : [label(173, 108, "step " + first, "middle")]),
        label(44, high > low ? 12 : 54, number(high), "end"), label(44, 95, high > low ? number(low) : "", "end")));
  }

  const names = Object.keys(data.curves).filter((name) => data.curves[name][1].some((value) => value !== null));
  const rest = names.filter((name) => !MAIN.includes(name)).sort();
  byId("curves").append(...MAIN.filter((name) => names.includes(name)).map((name) => curve(name, ...data.curves[name])));
  if (!names.length) byId("curves").append(make("p", {}, "nothing is logged yet"));
  const [summary, hidden] = byId("more-curves").children;
  summary.append(rest.length + " more");
  byId("more-curves").hidden = !rest.length;
  byId("more-curves").addEventListener("toggle", () => {
    if (!hidden.children.length) hidden.append(...rest.map((name) => curve(name, ...data.curves[name])));
  });

  // --- one sample

  function textOf(classes, text) {
    const shown = text === "" ? [make("span", { class: "soft" }, "empty")] : nodes(text);
    return make("div", { class: "said " + classes, dir: "auto" }, ...shown);
  }

  // Of an episode, what the environment said is set off from the policy's words.
  function completionOf(sample) {
    if (sample.by_policy === null || sample.tokens.join("") !== sample.completion) return textOf("", sample.completion);
    const whole = make("div", { class: "said", dir: "auto" });
    for (let from = 0, to; from < sample.tokens.length; from = to) {
      const mine = sample.by_policy[from];
      for (to = from + 1; to < sample.tokens.length && sample.by_policy[to] === mine;) to += 1;
      const part = nodes(sample.tokens.slice(from, to).join(""));
      whole.append(...(mine ? part : [make("span", { class: "given" }, ...part)]));
    }
    return whole;
  }

  function own(sample, place) {
    return sample.actions !== null && (sample.by_policy === null || sample.by_policy[place]);
  }

  function advantageAt(sample, place) {
    return Array.isArray(sample.advantages) ? sample.advantages[place] : sample.advantages;
  }

  function probability(sample, place) {
    return sample.log_probs[place] === null ? 0 : Math.exp(sample.log_probs[place]);
  }

  function choice(sample, place) {
    const parts = ["token " + visible(JSON.stringify(sample.tokens[place]))];
    if (data.space === "latent") parts.push("action " + sample.actions[place]);
    parts.push("probability " + number(probability(sample, place)), "policy of version " + sample.versions[place]);
    const advantage = advantageAt(sample, place);
    if (advantage !== null) parts.push("advantage " + number(advantage));
    const shown = make("div", { class: "choice" }, parts.join(", "));
    if (sample.others && sample.others[place]) shown.append(others(sample.others[place], sample.actions[place]));
    return shown;
  }

  function others(tokens, taken) {
    const actions = new Map();
    tokens.forEach((token, action) => actions.set(token, [...(actions.get(token) || []), action]));
    const rows = [...actions].sort((a, b) => b[1].length - a[1].length).map(([token, some]) =>
      make("tr", some.includes(taken) ? { class: "taken" } : {},
        make("td", {}, make("span", { class: "said", dir: "auto" }, ...nodes(JSON.stringify(data.vocabulary[token])))),
        make("td", {}, (some.length > 1 ? "actions " : "action ") + some.join(" "))));
    const count = actions.size === 1 ? "one token" : actions.size + " different tokens";
    return make("div", {}, make("div", {}, "under all actions " + count + ":"), make("table", {}, make("tbody", {}, ...rows)));
  }

  // One stop of the tabulator; arrow keys go on from token to token, and what is shown goes with them.
  function strip(sample) {
    const line = make("div", { class: "tokens", role: "group", "aria-label": "tokens", dir: "auto" });
    const below = make("div", { "aria-live": "polite" });
    const buttons = [];
    let pressed = null;

    function press(button, place) {
      if (pressed) pressed.setAttribute("aria-pressed", "false");
      pressed = pressed === button ? null : button;
      below.replaceChildren(...(pressed ? [choice(sample, place)] : []));
      if (pressed) pressed.setAttribute("aria-pressed", "true");
      for (const [one] of buttons) one.setAttribute("tabindex", one === button ? "0" : "-1");
    }

    function key(event, at) {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1, Enter: at, " ": at }[event.key];
      if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      if (!buttons[to]) return;
      if (to === at && event.key.length > 1 && event.key !== "Enter") return; // Home and End where one is
      press(...buttons[to]);
      buttons[to][0].focus();
    }

    sample.tokens.forEach((token, place) => {
      const text = nodes(token.replace(/\n/g, "⏎\n"));
      if (!own(sample, place)) {
        if (token) line.append(make("span", { class: "given" }, ...text));
        return;
      }
      const [p, at] = [probability(sample, place), buttons.length];
      const button = make("span", { role: "button", tabindex: at ? "-1" : "0", class: "token", "aria-pressed": "false",
        title: (data.space === "latent" ? "action " + sample.actions[place] + ", " : "") + "probability " + number(p) },
      ...(text.length ? text : ["·"]));
      button.style.setProperty("--doubted", (1 - p).toFixed(3));
      button.addEventListener("click", () => press(button, place));
      button.addEventListener("keydown", (event) => key(event, at));
      buttons.push([button, place]);
      line.append(button);
    });
    return [line, below];
  }

  function card(sample, prompt) {
    const figures = make("div", { class: "figures" }, make("span", {}, "reward " + number(sample.reward)));
    for (const one of sample.parts) figures.append(make("span", { class: "soft" }, visible(one.name) + " " + number(one.value)));
    const advantage = Array.isArray(sample.advantages) ? null : sample.advantages;
    if (advantage !== null) {
      const sign = advantage > 0 ? "up" : advantage < 0 ? "down" : "soft";
      figures.append(make("span", { class: sign }, "advantage " + number(advantage)));
    }
    const said = sample.tokens.filter((_, place) => own(sample, place)).length || sample.tokens.length;
    figures.append(make("span", { class: "soft" }, said + (said === 1 ? " token" : " tokens") + (sample.truncated ? ", cut off" : "")));
    if (sample.actions !== null && data.space === "latent") {
      const some = sample.actions.filter((_, place) => own(sample, place));
      figures.append(make("span", { class: "soft" }, "actions " + some.slice(0, 8).join(" ") + (some.length > 8 ? " …" : "")));
    }
    const whole = make("article", { class: "sample" }, figures);
    if (sample.prompt !== prompt) whole.append(textOf("prompt", data.prompts[sample.prompt])); // a later part of an episode
    whole.append(completionOf(sample));
    if (sample.failure) whole.append(make("div", { class: "failure" }, "no reward: " + visible(sample.failure)));
    if (sample.actions !== null) {
      const details = make("details", {}, make("summary", {}, "token by token"));
      details.addEventListener("toggle", () => {
        if (details.children.length === 1) details.append(...strip(sample));
      });
      whole.append(details);
    }
    return whole;
  }

  // --- groups side by side

  function group(step, samples) {
    if (!samples) return make("div", { class: "group absent" }, step + ": nothing here that passes the filters");
    const [first] = samples;
    const rewards = samples.map((sample) => sample.reward).filter((reward) => reward !== null);
    const mean = rewards.length ? ", mean reward " + number(rewards.reduce((a, b) => a + b, 0) / rewards.length) : "";
    const title = (first.kind === "train" ? "step " : "version ") + step + ", prompt " + first.group + mean;
    const chips = make("ul", { class: "rewards", "aria-label": "rewards" },
      ...samples.map((sample) => make("li", {}, number(sample.reward))));
    return make("section", { class: "group" }, make("h3", {}, title), textOf("prompt", data.prompts[first.prompt]),
      ...(samples.length > 1 ? [chips] : []), ...samples.map((sample) => card(sample, first.prompt)));
  }

  function passing(step) {
    const [low, high] = [byId("low").value, byId("high").value];
    const text = byId("text").value.toLowerCase();
    const groups = new Map();
    for (const sample of data.samples) {
      if (sample.kind !== byId("kind").value || String(sample.step) !== step) continue;
      if (low !== "" && !(sample.reward !== null && sample.reward >= Number(low))) continue;
      if (high !== "" && !(sample.reward !== null && sample.reward <= Number(high))) continue;
      if (text && !(data.prompts[sample.prompt] + "\n" + sample.completion).toLowerCase().includes(text)) continue;
      groups.set(sample.group, [...(groups.get(sample.group) || []), sample]);
    }
    return groups;
  }

  function pairs(left, right) {
    // Evaluations ask the same problems every time; a step's prompts are its own.
    if (byId("kind").value !== "train") {
      const all = [...new Set([...left.keys(), ...right.keys()])].sort((a, b) => a - b);
      return all.map((key) => [left.get(key), right.get(key)]);
    }
    const [ones, others] = [[...left.values()], [...right.values()]];
    return Array.from({ length: Math.max(ones.length, others.length) }, (_, i) => [ones[i], others[i]]);
  }

  let shown = 0; // groups, or pairs of them

  // From the first prompt on; or, with more, what follows those that are shown.
  function render(more) {
    const [a, b] = [byId("left").value, byId("right").value];
    const two = b !== "" && b !== a;
    const [left, right] = [passing(a), two ? passing(b) : new Map()];
    const all = pairs(left, right);
    const count = [...left.values(), ...right.values()].reduce((sum, some) => sum + some.length, 0);
    const prompts = byId("kind").value === "train" ? left.size + right.size : all.length;
    byId("count").textContent = data.samples.length ? count + " completions pass, of " + prompts + " prompts" : "";
    if (!more) {
      shown = 0;
      byId("groups").replaceChildren();
    }
    byId("groups").append(...all.slice(shown, shown + PAGE).map(([one, other]) =>
      make("div", { class: two ? "pair two" : "pair" }, group(a, one), ...(two ? [group(b, other)] : []))));
    shown += PAGE;
    byId("more").hidden = all.length <= shown;
  }

  function choose(id, options, value) {
    byId(id).replaceChildren(...options.map(([key, text]) => make("option", { value: key }, text)));
    byId(id).value = value;
  }

  function stepsOf(kind) {
    return [...new Set(data.samples.filter((sample) => sample.kind === kind).map((sample) => String(sample.step)))];
  }

  function chooseSteps() {
    const steps = stepsOf(byId("kind").value);
    const options = steps.map((step) => [step, step]);
    choose("left", options, steps[0] || "");
    choose("right", [["", "none"], ...options], steps.length > 1 ? steps[steps.length - 1] : "");
  }

  byId("kept").textContent = data.kept;
  byId("filters").hidden = !data.samples.length;
  byId("shading").hidden = data.samples.every((sample) => sample.actions === null);
  const kinds = Object.keys(KINDS).filter((kind) => stepsOf(kind).length);
  choose("kind", kinds.map((kind) => [kind, KINDS[kind]]), kinds[0] || "");
  chooseSteps();
  render(false);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", (event) => {
    if (event.target === byId("kind")) chooseSteps();
    render(false);
  });
  byId("more").addEventListener("click", () => render(true));
})();

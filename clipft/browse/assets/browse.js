// Searches, shows both lists, takes verdicts. Replies are of the form that app.py describes.
"use strict";
(() => {
  const TOKEN = location.pathname.split("/")[1];
  const $ = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat("en");
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  let state = null, trial = null, asking = null, last = null;

  const blind = () => document.querySelector("[name=mode]:checked").value === "blind";

  const say = (text, wrong = false) => {
    $("status").textContent = text;
    $("status").classList.toggle("wrong", wrong);
  };

  const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

  const cancel = () => {
    asking?.abort();
    asking = null;
    document.body.removeAttribute("aria-busy");
  };

  // The page shows the newest reply only: an earlier one that is still under way is dropped
  const ask = async (path, body, waiting) => {
    cancel();
    const own = asking = new AbortController();
    say(waiting);
    document.body.setAttribute("aria-busy", "true");
    try {
      const options = { method: "POST", headers: { "X-Clipft-Token": TOKEN }, body, signal: own.signal };
      const reply = await fetch(path, options);
      const content = await reply.json().catch(() => ({ error: `the server answered ${reply.status}`, hint: "" }));
      if (own !== asking) return null;
      if (!content.error) return content;
      say([content.error, content.hint].filter(Boolean).map(sentence).join(" "), true);
    } catch (error) {
      if (error.name === "AbortError") return null;
      say("There is no answer. Is clipft browse still running in the terminal?", true);
    } finally {
      if (own === asking) document.body.removeAttribute("aria-busy");
    }
    return null;
  };

  const whereElse = (image, model) => {
    const other = model === "fine_tuned" ? "pretrained" : "fine-tuned";
    const place = `${other}: rank\u00a0${number.format(image.other_rank)}`;
    if (image.other_rank > last.count) {
      return [make("span", { className: "only", textContent: "only here" }), make("br"), place];
    }
    const moved = model === "fine_tuned" ? image.other_rank - image.rank : image.rank - image.other_rank;
    return [moved ? `${place}, ${moved > 0 ? "up" : "down"} ${Math.abs(moved)}` : "same rank in both"];
  };

  const listed = (image, at, list, own) => {
    const named = Boolean(list.model);
    const picture = make("img", { src: `image/${image.number}`, loading: "lazy", alt: image.caption || image.key });
    picture.addEventListener("error", () => picture.replaceWith(make("p", { textContent: "no image" })));
    const words = make("figcaption");
    const score = named ? ` ${image.score.toFixed(3)}` : "";
    words.append(make("span", { className: "score" }, make("b", { textContent: `${at + 1}.` }), score));
    if (named && image.number === own) words.append(" ", make("span", { className: "own", textContent: "✓ its own image" }));
    if (named) words.append(make("p", { className: "where" }, ...whereElse(image, list.model)));
    if (image.caption) words.append(make("p", { textContent: image.caption }));
    words.append(make("small", { textContent: image.key, title: image.source || "" }));
    const item = make("li", {}, make("figure", {}, picture, words));
    item.dataset.number = image.number;
    if (named && image.other_rank > last.count) item.className = "unique";
    return item;
  };

  const show = (content) => {
    const { query, lists } = content;
    trial = content.trial || null;
    last = { count: lists[0].images.length };
    $("asked").textContent = $("asked").title = query.words || "Your picture";
    $("asked-picture").hidden = !query.picture;
    if (query.picture) $("asked-picture").src = query.picture;
    $("note").textContent = query.note;
    $("examples").hidden = true;
    $("judge").hidden = !trial;
    $("judged").hidden = true;
    lists.forEach((list, at) => {
      $(`name-${at}`).textContent = list.name;
      $(`list-${at}`).dataset.model = list.model || "";
      $(`list-${at}`).replaceChildren(...list.images.map((image, rank) => listed(image, rank, list, query.own)));
    });
    $("results").hidden = false;
  };

  const showTally = (tally) => {
    $("sentence").textContent = tally.sentence;
    $("tally").hidden = !tally.judged;
    for (const name of ["fine_tuned", "pretrained", "same", "neither"]) $(`count-${name}`).textContent = tally[name];
  };

  const found = (content) => {
    if (!content) return;
    show(content);
    say(trial ? "Which list fits the query better, A or B?" : content.summary);
    // Away from the field, so that the keys of the verdicts are not typed into it
    if (trial) $("asked").focus({ preventScroll: true });
  };

  const searchWords = async () => {
    const words = $("words").value;
    if (!words.trim()) return say("Type a description of an image first.", true);
    found(await ask("search", JSON.stringify({ words, blind: blind() }), "Searching ..."));
  };

  const searchPicture = async (file) => {
    if (!file) return;
    if (file.size > state.limits.bytes) return say(`The picture is larger than ${state.limits.bytes >> 20} MiB: choose a smaller one.`, true);
    $("words").value = "";
    found(await ask(`picture?blind=${blind() ? 1 : 0}`, file, "Searching with the picture ..."));
  };

  const draw = async () => {
    $("words").value = "";
    found(await ask("draw", "", "Drawing a caption ..."));
  };

  const judge = async (choice) => {
    const judged = trial;
    trial = null; // a second press is no second verdict
    const content = await ask("judge", JSON.stringify({ trial: judged, choice }), "Saving ...");
    if (!content) {
      trial ??= judged;
      return;
    }
    const said = { a: "A is better", b: "B is better", same: "both are equally good", neither: "neither is useful" };
    show(content);
    showTally(content.tally);
    $("asked").focus({ preventScroll: true });
    $("judged").hidden = false;
    say(`Saved: ${said[choice]}. ${content.lists.map((list) => list.name).join(", ")}.`);
  };

  $("search").addEventListener("submit", (event) => { event.preventDefault(); searchWords(); });
  $("choose").addEventListener("click", () => $("picture").click());
  $("picture").addEventListener("change", () => { searchPicture($("picture").files[0]); $("picture").value = ""; });
  for (const name of ["draw", "next"]) $(name).addEventListener("click", draw);
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => judge(button.dataset.choice));
  }
  for (const mode of document.querySelectorAll("[name=mode]")) {
    mode.addEventListener("change", () => {
      cancel();
      $("draw").hidden = !blind();
      $("results").hidden = true;
      trial = null;
      begin();
      say("");
    });
  }

  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("input[type=search], textarea");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const choice = { 1: "a", 2: "b", 3: "same", 4: "neither" }[event.key];
    if (choice && trial) judge(choice);
    else if (event.key.toLowerCase() === "d" && blind() && !trial) draw();
    else if (event.key === "/") $("words").focus();
    else return;
    event.preventDefault();
  });

  const carriesFiles = (event) => [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!carriesFiles(event)) return;
    event.preventDefault();
    searchPicture(event.dataTransfer.files[0]);
  });

  // An image that both lists have is outlined in both
  const point = (event) => {
    const item = event.target.closest?.("li[data-number]");
    for (const other of document.querySelectorAll(".sides li")) {
      other.classList.toggle("pointed", Boolean(item) && other !== item && other.dataset.number === item.dataset.number);
    }
  };
  document.addEventListener("pointerover", point);

  // What to do, before there are results
  const begin = () => {
    if (!state) return;
    const drawn = state.held_out
      ? `Captions are drawn from the ${number.format(state.held_out)} images that the run was not trained on`
      : "Captions are drawn from all images, and the run may have been trained on some of them";
    $("about").textContent = blind()
      ? `You see the lists as A and B, and learn which model is which once you have judged. ${drawn}.`
      : `Searches ${number.format(state.images)} images. You can also drop a picture anywhere on this page.`;
    $("examples").hidden = blind() || !state.examples.length;
  };

  fetch("state").then((reply) => reply.json()).then((content) => {
    state = content;
    document.title = `Browse: ${state.title}`;
    document.querySelector("h1").textContent = state.title;
    $("verdict").textContent = state.verdict;
    for (const words of state.examples) {
      const example = make("button", { type: "button", textContent: words, title: words });
      example.addEventListener("click", () => { $("words").value = words; searchWords(); });
      $("examples").append(example);
    }
    begin();
    showTally(state.tally);
  }).catch(() => say("There is no answer. Is clipft browse still running in the terminal?", true));
})();

// Lists the sections, looks captions up, and opens what is folded away before the page is printed.
"use strict";
(() => {
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  for (const nav of document.querySelectorAll("nav[hidden]")) {
    for (const heading of document.querySelectorAll("main section > h2")) {
      nav.append(make("a", { href: `#${heading.parentElement.id}`, textContent: heading.textContent }));
    }
    nav.hidden = false;
  }

  const folded = () => document.querySelectorAll("details:not([open])");
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...folded()];
    opened.forEach((details) => { details.open = true; });
  });
  window.addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));

  const MOST = 12;
  const box = document.querySelector(".lookup");
  if (!box) return;
  const data = (id) => JSON.parse(document.getElementById(id).textContent);
  const { pairs, queries } = data("lookup-data"), images = data("lookup-images");
  const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  const captions = queries.map((query) => plain(pairs[query.pair].caption));
  const [input, status, cases] = ["input", "[role=status]", ".cases"].map((name) => box.querySelector(name));
  const hint = status.textContent;

  const hit = (number, wanted) => {
    const { caption, place } = pairs[number], right = caption === wanted;
    const shown = images[number]
      ? make("img", { src: images[number], alt: `Image ${place}` })
      : make("p", { textContent: "no image" });
    const words = make("figcaption");
    if (right) words.append(make("span", { className: "mark", textContent: "✓ right" }), " ");
    words.append(caption);
    return make("figure", { className: right ? "right" : "", title: place }, shown, words);
  };

  const row = (name, numbers, wanted) => [
    make("p", { className: "remark", textContent: name }),
    make("div", { className: "group" }, ...numbers.map((number) => hit(number, wanted))),
  ];

  const article = (query) => {
    const { caption } = pairs[query.pair];
    const after = query.rank_after === null ? "" : ` before, ${query.rank_after} after`;
    return make("article", { className: "case" },
      make("p", {}, make("b", { textContent: caption }), make("br"),
        make("small", { textContent: `rank ${query.rank_before}${after}` })),
      ...row("pretrained", query.before, caption),
      ...(query.after.length ? row("fine-tuned", query.after, caption) : []));
  };

  input.addEventListener("input", () => {
    const words = plain(input.value).split(/\s+/).filter(Boolean);
    const found = words.length
      ? queries.filter((_, at) => words.every((word) => captions[at].includes(word))) : [];
    cases.replaceChildren(...found.slice(0, MOST).map(article));
    status.textContent = !words.length ? hint
      : found.length > MOST ? `${found.length} captions have these words; the first ${MOST} are shown.`
        : `${found.length || "No"} caption${found.length === 1 ? " has" : "s have"} these words.`;
  });
  box.hidden = false;
})();

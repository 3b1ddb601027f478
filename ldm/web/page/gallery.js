// The pictures that were made, the newest first: each with its seed, its receipt, a download, and a way to start from it.

const MOST = 24;
const shelf = element.querySelector(".ldm-gallery");

function tag(name, values, ...children) {
  const made = Object.assign(document.createElement(name), values);
  made.append(...children);
  return made;
}

function card(picture) {
  const image = tag("img", { src: picture.png, alt: `seed ${picture.seed}` });
  const save = tag("a", { href: picture.png, download: `${picture.seed}.png`, textContent: "Download" });
  const start = tag("button", { type: "button", textContent: "Start from it" });
  start.onclick = () => document.dispatchEvent(new CustomEvent("ldm-start", { detail: picture.png }));
  const again = tag("button", { type: "button", textContent: `Seed ${picture.seed}`, title: "use this seed again" });
  again.onclick = () => {
    const box = document.querySelector("#seed textarea, #seed input");
    box.value = picture.seed;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const receipt = tag("details", {}, tag("summary", { textContent: "Receipt" }), tag("pre", { textContent: picture.receipt }));
  const flag = picture.flagged ? [tag("p", { className: "ldm-refused", textContent: "withheld by the safety checker" })] : [];
  return tag("figure", {}, image, tag("figcaption", {}, again, start, save, ...flag, receipt));
}

watch("value", () => {
  if (!props.value) return;
  const { pictures } = JSON.parse(props.value);
  shelf.prepend(...pictures.map(card));
  while (shelf.children.length > MOST) shelf.lastChild.remove();
});

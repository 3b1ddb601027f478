// The pictures that were made, the newest first: each with its seed, its receipt, a download, and a way to start from it.

const MOST = 24;
const shelf = element.querySelector(".ldm-gallery");

function tag(name, values, ...children) {
  const made = Object.assign(document.createElement(name), values);
  made.append(...children);
  return made;
}

async function fetched(address) {
  const answer = await fetch(address).catch(() => null);
  if (!answer?.ok) return null;
  const picture = await answer.blob();
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.readAsDataURL(picture);
  });
}

async function card(picture) {
  const png = await fetched(picture.png); // at once, since the server does not keep it for long
  const again = tag("button", { type: "button", textContent: `Seed ${picture.seed}`, title: "use this seed again" });
  again.onclick = () => {
    const box = document.querySelector("#seed textarea, #seed input");
    box.value = picture.seed;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const receipt = tag("details", {}, tag("summary", { textContent: "Receipt" }), tag("pre", { textContent: picture.receipt }));
  const flag = picture.flagged ? [tag("p", { className: "ldm-refused", textContent: "withheld by the safety checker" })] : [];
  if (!png) {
    const gone = tag("p", { className: "ldm-refused", textContent: "the server has this picture no more; make it again" });
    return tag("figure", {}, gone, tag("figcaption", {}, again, ...flag, receipt));
  }
  const image = tag("img", { src: png, alt: `seed ${picture.seed}` });
  const save = tag("a", { href: png, download: `${picture.seed}.png`, textContent: "Download" });
  const start = tag("button", { type: "button", textContent: "Start from it" });
  start.onclick = () => document.dispatchEvent(new CustomEvent("ldm-start", { detail: png }));
  return tag("figure", {}, image, tag("figcaption", {}, again, start, save, ...flag, receipt));
}

async function show(pictures) {
  shelf.prepend(...(await Promise.all(pictures.map(card))));
  while (shelf.children.length > MOST) shelf.lastChild.remove();
}

let shown = Promise.resolve(); // one after the other, so that the newest stay the first
watch("value", () => {
  if (!props.value) return;
  const pictures = JSON.parse(props.value);
  shown = shown.then(() => show(pictures));
});

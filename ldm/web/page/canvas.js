// An image to start from, and a brush for what is to be made anew. The value is JSON of two data: URLs, or empty.

const MOST_BYTES = 16 * 2 ** 20;
const box = element.querySelector(".ldm-canvas");
box.innerHTML = `
  <input type="file" accept="image/png,image/jpeg,image/webp" aria-label="Image">
  <label>Brush <input type="range" min="4" max="128" value="32" aria-label="Brush"></label>
  <button type="button" class="clear">Clear the mask</button>
  <button type="button" class="remove">Remove the image</button>
  <p class="ldm-refused"></p>
  <div class="ldm-layers" hidden><img alt="the image to start from"><canvas></canvas></div>`;
const [file, brush] = box.querySelectorAll("input");
const [clear, remove] = box.querySelectorAll("button");
const [told, layers, image, canvas] = ["p", "div", "img", "canvas"].map((name) => box.querySelector(name));
const pen = canvas.getContext("2d");
let painted = false;

function publish() {
  if (!image.src) {
    props.value = "";
  } else if (!painted) {
    props.value = JSON.stringify({ image: image.src });
  } else {
    const whole = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
    const mask = whole.getContext("2d");
    mask.drawImage(canvas, 0, 0);
    mask.globalCompositeOperation = "source-in"; // all that was painted, white, on black
    mask.fillStyle = "white";
    mask.fillRect(0, 0, whole.width, whole.height);
    mask.globalCompositeOperation = "destination-over";
    mask.fillStyle = "black";
    mask.fillRect(0, 0, whole.width, whole.height);
    props.value = JSON.stringify({ image: image.src, mask: whole.toDataURL("image/png") });
  }
  trigger("change");
}

function unpaint() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  painted = false;
}

image.onload = () => {
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  layers.hidden = false;
  unpaint();
  publish();
};

image.onerror = () => {
  if (!image.getAttribute("src")) return;
  told.textContent = "this is no picture that a browser can show; choose a PNG, JPEG or WebP";
  remove.onclick();
};

function start(url) {
  told.textContent = "";
  image.src = url;
}

file.onchange = () => {
  const chosen = file.files[0];
  if (!chosen) return;
  if (chosen.size > MOST_BYTES) {
    told.textContent = `${chosen.size} bytes; choose a picture of at most ${MOST_BYTES}`;
    return;
  }
  const reader = new FileReader();
  reader.onload = () => start(reader.result);
  reader.readAsDataURL(chosen);
};

clear.onclick = () => {
  unpaint();
  publish();
};

remove.onclick = () => {
  image.removeAttribute("src");
  file.value = "";
  layers.hidden = true;
  unpaint();
  publish();
};

function stroke(event) {
  const place = canvas.getBoundingClientRect();
  const scale = canvas.width / place.width;
  pen.lineWidth = brush.value * scale;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = "#e33";
  pen.lineTo((event.clientX - place.left) * scale, (event.clientY - place.top) * scale);
  pen.stroke();
}

canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId);
  pen.beginPath();
  stroke(event);
  stroke(event); // a point is a line too
  canvas.onpointermove = stroke;
};

canvas.onpointerup = canvas.onpointercancel = () => {
  if (!canvas.onpointermove) return;
  canvas.onpointermove = null;
  painted = true;
  publish();
};

document.addEventListener("ldm-start", (event) => start(event.detail));

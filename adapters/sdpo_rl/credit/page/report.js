"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 10; // rows that are shown at first, and with each "Show more"
  const FULL = 3; // nats from which a colour does not grow any more
  const STRONGEST = 0.72; // share of the full colour: the text on it must be readable
  const inspector = document.getElementById("inspector");
  const narrow = matchMedia("(max-width: 760px)");

  // --- text -------------------------------------------------------------------------------------------------

  const INVISIBLE =
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]|\p{Cs}/gu;

  /** Text whose control and direction characters are shown instead of obeyed. */
  const visible = (text) =>
    text.replace(INVISIBLE, (character) => {
      const code = character.codePointAt(0);
      if (code < 0x20) return String.fromCodePoint(0x2400 + code);
      return `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
    });

  const element = (name, properties = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key.startsWith("aria-") || key.startsWith("data-") || key === "role") node.setAttribute(key, value);
      else node[key] = value;
    }
    node.append(...children);
    return node;
  };

  const number = (value, digits = 2) =>
    value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
  const short = (value) => String(Number(value.toPrecision(3))).replace("-", "−");
  const percent = (value) =>
    value >= 0.1 ? `${Math.round(value * 100)}%` : value >= 0.001 ? `${(value * 100).toFixed(1)}%` : "<0.1%";

  // --- curves -----------------------------------------------------------------------------------------------

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = data.charts[svg.dataset.chart];
    const cursor = svg.querySelector(".cursor");
    const outputs = [...svg.parentElement.querySelectorAll("output")];
    const place = svg.parentElement.querySelector(".at");
    const [left, right] = [Number(svg.dataset.left), Number(svg.dataset.right)];
    const span = chart.last - chart.first;
    const steps = [...new Set(chart.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
    let current = steps.length - 1;

    const show = (index) => {
      current = Math.max(0, Math.min(steps.length - 1, index));
      const step = steps[current];
      const x = span ? left + ((step - chart.first) / span) * (right - left) : (left + right) / 2;
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.setAttribute("visibility", "visible");
      chart.lines.forEach((line, i) => {
        // The last value up to this step: a held-out reward is not measured at every one.
        const at = line.steps.findLastIndex((each) => each <= step);
        outputs[i].textContent = at < 0 ? "–" : short(line.values[at]);
      });
      place.hidden = false;
      place.textContent = `step ${step}`;
    };
    const hide = () => {
      cursor.setAttribute("visibility", "hidden");
      for (const output of outputs) output.textContent = "";
      place.hidden = true;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const step = chart.first + ((x - left) / (right - left)) * span;
      let nearest = 0;
      steps.forEach((each, i) => {
        if (Math.abs(each - step) < Math.abs(steps[nearest] - step)) nearest = i;
      });
      show(nearest);
    });
    svg.addEventListener("pointerleave", () => document.activeElement !== svg && hide());
    svg.addEventListener("focus", () => svg.matches(":focus-visible") && show(current));
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: steps.length - 1 };
      if (event.key in moves) {
        event.preventDefault();
        show(moves[event.key]);
      }
    });
  }

  // --- completions ------------------------------------------------------------------------------------------

  const form = document.getElementById("tools");
  const columns = document.getElementById("columns");
  if (!form) return;

  const isSilent = (row) => row.divergence === null;

  const selected = (rows) => {
    const kind = form.kind.value;
    const bound = (input, otherwise) => (input.value === "" ? otherwise : Number(input.value));
    const low = bound(form.low, -Infinity);
    const high = bound(form.high, Infinity);
    const bounded = low !== -Infinity || high !== Infinity;
    const kept = rows.filter((row) => {
      if (kind === "success" && !row.success) return false;
      if (kind === "failure" && row.success) return false;
      if (kind === "silent" && !isSilent(row)) return false;
      return !bounded || (row.score !== null && row.score >= low && row.score <= high);
    });
    const orders = {
      divergence: (a, b) => (b.divergence ?? -1) - (a.divergence ?? -1) || a.step - b.step,
      agreement: (a, b) => (a.divergence ?? Infinity) - (b.divergence ?? Infinity) || a.step - b.step,
      newest: (a, b) => b.step - a.step || a.row - b.row,
      oldest: (a, b) => a.step - b.step || a.row - b.row,
    };
    return kept.sort((a, b) => orders[form.sort.value](a, b) || 0);
  };

  /** Background of a token: the sign chooses the colour, the size how much of it. */
  const paint = (token, row, index) => {
    const name = form.colour.value;
    const value = row[name]?.[index] ?? null;
    token.classList.toggle("none", value === null);
    if (value === null) return;
    const share = Math.min(Math.abs(value) / (name === "log_ratio" ? FULL : 0.5), 1) * STRONGEST;
    const colour = name !== "log_ratio" ? "--amount" : value < 0 ? "--less" : "--more";
    token.style.backgroundColor = share < 0.01 ? "" : `rgb(var(${colour}) / ${share.toFixed(3)})`;
  };

  const tokenNode = (row, index) => {
    const text = row.tokens[index];
    const node = element("span", { className: "tok", role: "option", tabIndex: index ? -1 : 0, "data-index": index });
    if (text === "") node.append(element("span", { className: "sign", textContent: "·" }));
    for (const part of visible(text).split(/(\n)/)) {
      if (part === "\n") node.append(element("span", { className: "sign", textContent: "↵" }), "\n");
      else if (part) node.append(part);
    }
    paint(node, row, index);
    return node;
  };

  const titled = (title, note, text) =>
    element(
      "div",
      {},
      element("h4", { textContent: title }, ...(note ? [element("small", { textContent: ` ${note}` })] : [])),
      element("p", { className: "text", textContent: visible(text), tabIndex: text.length > 600 ? 0 : -1 }),
    );

  const whySilent = (row) => {
    if (row.dropped) return "Without a teacher signal: the question leaves no room for a demonstration or feedback.";
    if (row.demonstration_used || row.feedback_used) return "Without a divergence: this row has the other part of the loss.";
    return "Without a teacher signal: no other completion of the prompt succeeded, and the teacher is shown no feedback.";
  };

  const rowNode = (row) => {
    const outcome = row.score === null ? "not judged" : row.success ? "succeeded" : "failed";
    const list = element("div", {
      className: "tokens", role: "listbox", "aria-label": `Tokens of row ${row.row} at step ${row.step}`,
    });
    list.append(...row.tokens.map((_, index) => tokenNode(row, index)));
    list.row = row;
    const completion = element("div", {}, element("h4", { textContent: "Completion" }), list);
    if (row.tokens_left_out) {
      completion.append(element("p", { className: "count", textContent: `${row.tokens_left_out} more tokens were not kept.` }));
    }
    if (isSilent(row)) completion.append(element("p", { className: "count", textContent: whySilent(row) }));
    const context = element("div", { className: "context" }, titled("Prompt", "as the student reads it", row.prompt));
    if (row.feedback !== null) {
      context.append(titled("Feedback", row.feedback_used ? "" : "not shown to the teacher", row.feedback));
    }
    for (const each of row.demonstrations) {
      const used = row.demonstration_used ? "" : ", not shown to the teacher";
      context.append(titled("Demonstration", `row ${each.row}${used}`, each.text));
    }
    if (row.teacher_prompt !== null) {
      context.append(
        element(
          "details",
          {},
          element("summary", { textContent: `The teacher's prompt${row.truncated ? ", cut to fit" : ""}` }),
          element("p", { className: "text", textContent: visible(row.teacher_prompt) }),
        ),
      );
    }
    return element(
      "article",
      { className: "row" },
      element(
        "header",
        {},
        element("span", { className: `outcome ${row.success ? "yes" : "no"}`, textContent: outcome }),
        element("span", {}, "score ", element("b", { textContent: row.score === null ? "–" : short(row.score) })),
        element("span", {}, "divergence ", element("b", { textContent: number(row.divergence, 3) })),
        element("span", {}, "step ", element("b", { textContent: row.step })),
        element("span", {}, "row ", element("b", { textContent: row.row })),
        element("span", {}, "tokens ", element("b", { textContent: row.ids.length + row.tokens_left_out })),
      ),
      element("div", { className: "parts" }, completion, context),
    );
  };

  const fill = (column, run, count) => {
    const rows = selected([...run.rows]);
    const title = data.runs.length > 1 ? [element("h3", { textContent: visible(run.name) })] : [];
    const shown = rows.slice(0, count);
    column.replaceChildren(
      ...title,
      element("p", { className: "count", role: "status", textContent: `${rows.length} of ${run.rows.length} completions` }),
      ...shown.map(rowNode),
    );
    if (shown.length < rows.length) {
      const more = element("button", { className: "more", type: "button", textContent: `Show ${Math.min(PAGE, rows.length - shown.length)} more` });
      more.addEventListener("click", () => {
        fill(column, run, count + PAGE);
        column.querySelectorAll(".row")[count]?.querySelector(".tok")?.focus();
      });
      column.append(more);
    }
  };

  const fillAll = () => {
    close();
    const wanted = form.run?.value ?? "";
    const runs = data.runs.filter((_, index) => wanted === "" || Number(wanted) === index);
    columns.classList.toggle("both", runs.length > 1);
    columns.replaceChildren(
      ...runs.map((run) => {
        const column = element("div", { className: "column" });
        fill(column, run, PAGE);
        return column;
      }),
    );
  };

  // --- the inspector ----------------------------------------------------------------------------------------

  let chosen = null; // the token that is shown
  let pinned = false; // by a click, a tap or the keyboard: moving the pointer does not change it

  const likeliest = (title, top, row, sampled) => {
    const items = (top ?? []).map(([id, probability]) => {
      const bar = element("i");
      bar.style.width = `${probability * 100}%`;
      const text = visible(row.texts[id]).replace(/\n/g, "↵").replace(/ /g, "␣");
      return element(
        "li",
        { className: id === sampled ? "sampled" : "" },
        bar,
        element("code", { textContent: text || "·" }),
        element("span", { textContent: percent(probability) }),
      );
    });
    return element("div", {}, element("h5", { textContent: title }), element("ol", {}, ...items));
  };

  const show = (token, { pin }) => {
    chosen?.classList.remove("chosen");
    chosen?.removeAttribute("aria-selected");
    [chosen, pinned] = [token, pin];
    token.classList.add("chosen");
    token.setAttribute("aria-selected", "true");
    const row = token.parentElement.row;
    const index = Number(token.dataset.index);
    const ratio = row.log_ratio?.[index] ?? null;
    const name = visible(row.tokens[index]).replace(/\n/g, "↵").replace(/ /g, "␣") || "part of a character";
    const head = element("p", { className: "head" }, element("code", { textContent: name }));
    if (pin) {
      const button = element("button", { type: "button", textContent: "✕", "aria-label": "Close" });
      button.addEventListener("click", () => {
        token.focus({ preventScroll: true });
        close(); // last: the focus shows the token again
      });
      head.append(button);
    }
    if (ratio === null) {
      inspector.replaceChildren(head, element("p", { className: "verdict", textContent: "This token has no loss." }));
    } else {
      const student = Math.exp(row.log_prob[index]);
      const teacher = Math.exp(row.log_prob[index] + ratio);
      const verdict =
        `log q − log p = ${number(ratio)}: student ${percent(student)}, teacher ${percent(teacher)}; ` +
        `divergence ${number(row.token_divergence[index], 3)}`;
      inspector.replaceChildren(
        head,
        element("p", { className: "verdict", textContent: verdict }),
        element(
          "div",
          { className: "pair" },
          likeliest("Student", row.student_top[index], row, row.ids[index]),
          likeliest("Teacher", row.teacher_top[index], row, row.ids[index]),
        ),
      );
    }
    inspector.hidden = false;
    inspector.style.left = inspector.style.top = "";
    if (narrow.matches) return;
    const box = token.getClientRects()[0];
    const left = Math.min(box.left, document.documentElement.clientWidth - inspector.offsetWidth - 12);
    const below = box.bottom + 8 + inspector.offsetHeight < innerHeight;
    const top = below ? box.bottom + 8 : box.top - 8 - inspector.offsetHeight;
    inspector.style.left = `${Math.max(12, left) + scrollX}px`;
    inspector.style.top = `${Math.max(0, top + scrollY)}px`;
  };

  function close() {
    chosen?.classList.remove("chosen");
    chosen?.removeAttribute("aria-selected");
    [chosen, pinned] = [null, false];
    inspector.hidden = true;
  }

  const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".tok") : null);

  columns.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (pinned || event.pointerType !== "mouse") return;
    if (token) show(token, { pin: false });
    else close();
  });
  columns.addEventListener("pointerleave", () => pinned || close());
  document.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token) {
      if (pinned && token === chosen) close();
      else show(token, { pin: true });
    } else if (!inspector.contains(event.target)) close();
  });
  columns.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token?.matches(":focus-visible") && token !== chosen) show(token, { pin: true });
  });
  columns.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    const list = token.parentElement;
    const moves = {
      ArrowLeft: token.previousElementSibling, ArrowRight: token.nextElementSibling,
      ArrowUp: token.previousElementSibling, ArrowDown: token.nextElementSibling,
      Home: list.firstElementChild, End: list.lastElementChild,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = moves[event.key];
    if (!next) return;
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    show(next, { pin: true });
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && close());

  form.addEventListener("input", (event) => {
    if (event.target.name !== "colour") return fillAll();
    close();
    document.getElementById("legend").classList.toggle("amounts", form.colour.value !== "log_ratio");
    for (const list of columns.querySelectorAll(".tokens")) {
      [...list.children].forEach((token, index) => paint(token, list.row, index));
    }
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  fillAll();
})();

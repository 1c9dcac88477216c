// Draws /openapi.json. Only text nodes are made, so nothing in the document can become markup.
"use strict";

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  for (const child of children) made.append(child);
  return made;
}

function name(ref) {
  return ref.split("/").pop();
}

function kind(schema) {
  if (!schema) return "any";
  if (schema.$ref) return name(schema.$ref);
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return "list of " + kind(schema.items);
  if (schema.type === "object" && schema.additionalProperties) return "map of " + kind(schema.additionalProperties);
  const type = [schema.type || "any", schema.format && "(" + schema.format + ")"].filter(Boolean).join(" ");
  const bounds = [];
  if (schema.minimum !== undefined) bounds.push("≥ " + schema.minimum);
  if (schema.maximum !== undefined) bounds.push("≤ " + schema.maximum);
  if (schema.maxLength !== undefined) bounds.push("≤ " + schema.maxLength + " characters");
  return [type, ...bounds].join(", ");
}

// Text with `code` in it, as nodes.
function prose(text) {
  return text.split("`").map((part, number) => number % 2 ? element("code", {}, part) : part);
}

function fieldTable(schema) {
  const required = new Set(schema.required || []);
  const rows = Object.entries(schema.properties || {}).map(([field, inner]) =>
    element("tr", {},
      element("td", {}, element("code", {}, field)),
      element("td", {}, kind(inner)),
      element("td", { class: "soft" }, ...prose([required.has(field) ? "required" : "", inner.description || ""].filter(Boolean).join(". ")))));
  return element("table", {}, ...rows);
}

function resolve(spec, schema) {
  return schema && schema.$ref ? spec.components.schemas[name(schema.$ref)] : schema;
}

function operation(spec, path, method, about) {
  const section = element("section", { id: about.operationId },
    element("h2", {}, element("span", { class: "method" }, method.toUpperCase()), path),
    element("p", {}, ...prose(about.summary || "")));
  if (about.parameters && about.parameters.length) {
    section.append(element("h3", {}, "Parameters"), element("table", {}, ...about.parameters.map((one) =>
      element("tr", {},
        element("td", {}, element("code", {}, one.name)),
        element("td", {}, one.in + ", " + kind(one.schema)),
        element("td", { class: "soft" }, ...prose([one.required ? "required" : "", one.description || one.schema.description || ""].filter(Boolean).join(". ")))))));
  }
  const media = about.requestBody && Object.values(about.requestBody.content)[0];
  if (media) {
    section.append(element("h3", {}, "Body"));
    const schema = resolve(spec, media.schema);
    if (schema && schema.properties) section.append(fieldTable(schema));
    if (media.example !== undefined) section.append(element("pre", {}, JSON.stringify(media.example, null, 2)));
  }
  section.append(element("h3", {}, "Answers"), element("table", {}, ...Object.entries(about.responses).map(([status, answer]) => {
    const types = Object.values(answer.content || {}).map((one) => kind(one.schema));
    return element("tr", {},
      element("td", {}, element("code", {}, status)),
      element("td", {}, [...new Set(types)].join(" or ")),
      element("td", { class: "soft" }, ...prose(answer.description || "")));
  })));
  return section;
}

function draw(spec) {
  const page = document.getElementById("page");
  const contents = document.getElementById("contents");
  page.append(...(spec.info.description || "").split("\n\n").map((part) => element("p", {}, ...prose(part))),
    element("p", { class: "soft" }, "Version " + spec.info.version + ". The document: ", element("a", { href: "/openapi.json" }, "/openapi.json")));
  for (const tag of spec.tags) {
    contents.append(element("h2", {}, tag.name));
    for (const [path, methods] of Object.entries(spec.paths)) {
      for (const [method, about] of Object.entries(methods)) {
        if (!about.tags.includes(tag.name)) continue;
        contents.append(element("a", { href: "#" + about.operationId }, method.toUpperCase() + " " + path));
        page.append(operation(spec, path, method, about));
      }
    }
  }
  contents.append(element("h2", {}, "types"));
  for (const [title, schema] of Object.entries(spec.components.schemas)) {
    if (!schema.properties) continue;
    contents.append(element("a", { href: "#type-" + title }, title));
    page.append(element("section", { id: "type-" + title }, element("h2", {}, title),
      element("p", {}, ...prose(schema.description || "")), fieldTable(schema)));
  }
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

fetch("/openapi.json").then((answer) => answer.json()).then(draw).catch((error) => {
  document.getElementById("page").append(element("p", {}, "The document could not be read: " + error));
});

// Nodes and widgets of the page.

// Calls `extra` after the method or callback that may be there already.
export function after(object, name, extra) {
  const original = object[name]
  object[name] = function (...values) {
    const result = original?.apply(this, values)
    extra()
    return result
  }
}

export function append(root, tag, className = '') {
  const made = document.createElement(tag)
  made.className = className
  root.append(made)
  return made
}

export function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name)
}

export function isLinked(node, name) {
  return node.inputs?.some((input) => input.name === name && input.link != null) ?? false
}

// The node behind an input, past reroutes.
export function originOf(node, name) {
  let origin = node.getInputNode(node.inputs.findIndex((input) => input.name === name))
  while (origin?.type === 'Reroute') origin = origin.getInputNode(0)
  return origin
}

// Brings the widget's value to what `nearest` says, wherever it is set by hand.
export function snapping(node, name, nearest) {
  const widget = widgetOf(node, name)
  const original = widget.callback
  widget.callback = function (value, ...rest) {
    const snapped = nearest(value) || value
    if (snapped !== value) this.value = snapped
    return original?.call(this, snapped, ...rest)
  }
}

-- Each thread pays with its own keys and order numbers, so that no two requests are the same.
local targets = {}
local threads = 0
function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end
function init(args)
  for line in io.lines(args[1]) do
    local key, wallet = line:match("(%S+) (%S+)")
    targets[#targets + 1] = { key = key, wallet = wallet }
  end
  run = args[2]
  count = 0
end
function request()
  count = count + 1
  local name = run .. "-" .. number .. "-" .. count
  local target = targets[(count * 7 + number * 13) % #targets + 1]
  local body = '{"order_id": "' .. name .. '", "amount": 10000, "currency": "CNY", "channel": "wallet", "method": "wallet", '
    .. '"description": "Two coffees", "metadata": {"table": "7"}, "payer": {"wallet": "' .. target.wallet .. '"}}'
  return wrk.format("POST", "/v1/payments", {
    ["Authorization"] = "Bearer " .. target.key, ["Idempotency-Key"] = name, ["Content-Type"] = "application/json",
  }, body)
end
function done(summary, latency, requests)
  io.write(string.format('RESULT {"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "refused": %d, "errors": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end

#!/usr/bin/env bash
# curl, over HTTP/1.1 and over HTTP/2 without TLS, through residentd.
#
#     curl.sh ADDRESS MODEL ALIAS [stub]
#
# MODEL, also called ALIAS, begins each word it says with its name. With `stub` also what only a stub does.
set -euo pipefail
address=$1 model=$2 alias=$3 stub=${4:-}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# check WHAT COMMAND...: says what was checked, if the command says yes.
check() {
    local what=$1
    shift
    "$@" || { echo "curl $version: $what: NOT so; got $(head -c 2000 "$folder/head" "$folder/body" 2>&1)" >&2; exit 1; }
    echo "curl $version: $what"
}

# ask ARGUMENTS...: asks, and leaves head, body and figures in the folder.
ask() {
    : > "$folder/head"; : > "$folder/body"
    curl -sS "$version" --max-time 30 -D "$folder/head" -o "$folder/body" -w '%{http_code} %{http_version}\n' "$@" > "$folder/figures"
}

post() {
    ask -H 'content-type: application/json' -d "$2" "${@:3}" "http://$address$1"
}

answered() { [[ $(cat "$folder/figures") == "$1 $number" ]]; }
has_header() { grep -qi "^$1:" "$folder/head"; }
says() { python3 - "$folder/body" "$1" <<'PYTHON'
import json, sys
body = json.load(open(sys.argv[1], encoding="utf-8"))
sys.exit(not eval(sys.argv[2], {"body": body}))
PYTHON
}
speaks() { says "all(word.startswith(('$model', 'pid=', 'model=', 'bytes=')) for word in body['choices'][0]['text'].split())"; }
# Whether events ended by [DONE] came as such, and the words in them, put together, are the model's.
streams() { python3 - "$folder/body" "$model" <<'PYTHON'
import json, sys
events = open(sys.argv[1], encoding="utf-8").read().split("\n\n")
parts = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
words = "".join(part["choices"][0]["text"] for part in parts if part["choices"]).split()
good = all(word.startswith((sys.argv[2], "pid=", "model=", "bytes=")) for word in words)
sys.exit(not (good and len(words) >= 5 and events[-2:] == ["data: [DONE]", ""]))
PYTHON
}
is_idle() {
    local seconds
    for ((seconds = 0; seconds < 300; seconds++)); do
        curl -sS --max-time 5 "http://$address/api/v1/models/$model" | grep -q '"in_flight":0[,}]' && return
        sleep 0.1
    done
    return 1
}
# The first bytes of a long stream are here while it goes on; then curl leaves.
streams_at_once() {
    local first
    first=$(curl -sSN "$version" --max-time 30 -d "{\"model\":\"$model\",\"prompt\":\"x\",\"max_tokens\":400,\"stream\":true,\"x_pace_ms\":100}" \
        "http://$address/v1/completions" 2>/dev/null | head -n 1) || true
    [[ $first == 'data: {'* ]]
}

for version in --http1.1 --http2-prior-knowledge; do
    number=1.1
    [[ $version == --http1.1 ]] || number=2
    ask "http://$address/v1/models"
    check "the models" answered 200
    check "are listed with their aliases" says "{'$model', '$alias'} <= {model['id'] for model in body['data']}"
    ask --head "http://$address/v1/models"
    check "HEAD of the models has no body" eval 'answered 200 && [[ ! -s $folder/body || $(head -c 5 "$folder/body") == HTTP/ ]]'
    post /v1/completions "{\"model\":\"$model\",\"prompt\":\"Hello\",\"max_tokens\":4}"
    check "a completion" answered 200
    check "is the model's" speaks
    # curl calls its data a form unless it is told.
    ask -d "{\"prompt\":\"Hello\",\"max_tokens\":4,\"model\":\"$alias\"}" "http://$address/v1/completions"
    check "a completion by an alias, its type not told" eval 'answered 200 && speaks'
    post /v1/completions "{\"prompt\":\"Hello\",\"max_tokens\":4}" -H "x-model: $alias"
    check "a model named by the header" eval 'answered 200 && speaks'
    post "/v1/completions?model=$alias" '{"prompt":"Hello","max_tokens":4}'
    check "by the query" eval 'answered 200 && speaks'
    post "/upstream/$alias/v1/completions" '{"prompt":"Hello","max_tokens":4}'
    check "by the path" eval 'answered 200 && speaks'
    post /v1/completions "{\"model\":\"$model\",\"prompt\":\"Hello\",\"max_tokens\":6,\"stream\":true}" -N
    check "a stream" answered 200
    check "comes in events, in order, to its end" streams
    check "and comes at once" streams_at_once
    check "and curl, which left it, leaves the worker free" is_idle
    post /v1/completions '{"model":"no-such","prompt":"x"}'
    check "an unknown model is a 404" answered 404
    check "which says so and what there is" says "body['error']['code'] == 'model_not_found' and '$model' in body['error']['message']"
    post /v1/completions 'no JSON'
    check "no JSON is a 400" eval "answered 400 && says \"body['error']['code'] == 'bad_request'\""
    ask -X DELETE "http://$address/v1/models"
    check "DELETE of the models is refused" answered 400
    [[ -n $stub ]] || continue

    ask --head -H "x-model: $model" "http://$address/upstream/$model/echo"
    check "HEAD goes to the worker" eval 'answered 200 && has_header x-stub-pid && has_header content-length'
    ask -X OPTIONS -H 'origin: http://page.example' -H 'access-control-request-method: POST' "http://$address/upstream/$model/echo"
    check "OPTIONS of a strange page's browser allows it nothing" eval '! has_header access-control-allow-origin'
    ask -X OPTIONS "http://$address/upstream/$model/echo"
    check "OPTIONS goes to the worker" eval "answered 200 && says \"body['method'] == 'OPTIONS'\""
    for method in GET PUT PATCH DELETE; do
        ask -X "$method" --data-binary 'some bytes' "http://$address/upstream/$model/echo?a=1&b=%2F"
        check "$method goes to the worker" eval "answered 200 && says \"(body['method'], body['query'], body['body_start']) == ('$method', 'a=1&b=%2F', 'some bytes')\""
    done
    head -c 3000000 /dev/zero > "$folder/audio"
    ask -F "model=$model" -F "file=@$folder/audio" "http://$address/v1/audio/transcriptions"
    check "a form with a file" eval "answered 200 && says \"3000000 < int(body['text'].split('bytes=')[1].split()[0]) < 3001000\""
    ask -T "$folder/audio" -H 'expect: 100-continue' "http://$address/upstream/$model/sink"
    check "a file that is announced and then sent" eval "answered 200 && says \"body['length'] == 3000000\""
    printf '{"model":"%s","prompt":"Hello","max_tokens":4}' "$alias" | ask -H 'transfer-encoding: chunked' -T - -X POST "http://$address/v1/completions"
    check "a body of no told length" eval 'answered 200 && speaks'
    post /v1/completions "{\"model\":\"$model\",\"prompt\":\"Hello\",\"x_status\":418}"
    check "a worker's own status comes as it is" eval "answered 418 && says \"body['error']['message'] == 'as asked'\""
    cut=0
    post /v1/completions "{\"model\":\"$model\",\"prompt\":\"Hello\",\"max_tokens\":9,\"stream\":true,\"x_break_after\":3}" 2>/dev/null || cut=$?
    check "a stream that breaks is an error to curl, too" eval '((cut != 0)) && grep -q "^event: error" "$folder/body"'
done

# Not over HTTP/2: curl 7.88 asks no second time on a connection that began with it, whatever the server.
for how in '--http1.1 --parallel --parallel-max 20' --http1.1; do
    version=$how
    : > "$folder/head"; : > "$folder/body"
    # shellcheck disable=SC2086
    curl -sS $how --max-time 60 -H "x-model: $model" -d '{"prompt":"x","max_tokens":1}' -o /dev/null \
        -w '%{http_code} %{num_connects}\n' "http://$address/v1/completions?[1-100]" > "$folder/body" 2> /dev/null
    check "a hundred requests" [ "$(grep -c '^200 ' "$folder/body")" = 100 ]
    [[ $how == *parallel* ]] || check "share one connection" [ "$(grep -c ' 1$' "$folder/body")" = 1 ]
done

